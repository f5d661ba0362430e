"""localize: any ``nn.Module`` in local-learning form.

    local = to_local(model, method="scpl", parts=4)
    Trainer(local, optimizer=partial(torch.optim.Adam, lr=1e-3)).fit(loader, epochs=10)
"""

from localize._version import __version__
from localize.api import load, to_local
from localize.errors import (
    CheckpointError,
    ConfigError,
    CutError,
    LocalizeError,
    MethodError,
    PlacementError,
    TaskError,
    TraceError,
    WireError,
)
from localize.heads.registry import get_method, list_methods, register_method
from localize.model import LocalModel
from localize.runtime.trainer import Trainer
from localize.task import Task

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CutError",
    "LocalModel",
    "LocalizeError",
    "MethodError",
    "PlacementError",
    "Task",
    "TaskError",
    "TraceError",
    "Trainer",
    "WireError",
    "__version__",
    "get_method",
    "list_methods",
    "load",
    "register_method",
    "to_local",
]
