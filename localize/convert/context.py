"""What the pieces of a capture share: one value for the whole session, one for each recording."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from localize.convert.audit import Audit
from localize.convert.constants import Constants
from localize.convert.extras import Extras
from localize.convert.leaves import LeafPolicy
from localize.convert.restore import ModelState
from localize.convert.settings import Settings
from localize.convert.storages import Storages


@dataclass
class Remedies:
    """What was decided about obstacles so far, beside the modules that are kept whole (see ``LeafPolicy``)."""

    watch_random: bool = False  # random numbers of Python or NumPy are drawn somewhere: see where
    general: bool = False  # libraries are told that they are traced
    fake: bool = False  # the model is recorded on fake tensors, without data
    settled: bool = False  # the model ran once before the recording
    rebound: set[str] = field(default_factory=set)  # buffers that the forward gives new values by assignment


@dataclass(frozen=True)
class Subject:
    """The model that is captured, and what holds for all of its recordings."""

    root: nn.Module
    policy: LeafPolicy
    extras: Extras
    remedies: Remedies
    storage_numbers: Iterator[int]
    original: dict[int, dict[str, Any]]  # every module's attributes before the session, by the module's id
    shapes: dict[str, torch.Size]  # of parameters and buffers before the session, by name
    reassigned: set[str]  # attributes that a forward was seen to set, and graphs do not
    hooked: set[str]  # entered modules with forward hooks, which run at capture only

    @classmethod
    def of(cls, model: nn.Module) -> Subject:
        return cls(
            root=model,
            policy=LeafPolicy(model),
            extras=Extras(model),
            remedies=Remedies(),
            storage_numbers=itertools.count(),
            original={id(module): dict(vars(module)) for module in model.modules()},
            shapes={name: t.shape for name, t in (*model.named_parameters(), *model.named_buffers())},
            reassigned=set(),
            hooked=set(),
        )


@dataclass(frozen=True)
class Context(Subject):
    """One recording: what its pieces know of the model, and where they note what they see.

    ``audit`` sees operators, ``settings`` the plain attributes that were read.
    """

    modules: dict[str, nn.Module]  # of the model, by path
    constants: Constants
    audit: Audit
    storages: Storages
    settings: Settings

    @classmethod
    def before(cls, subject: Subject, state: ModelState) -> Context:
        """For a recording that is about to begin; ``state`` is the model's now."""
        root = subject.root
        return cls(
            **vars(subject),
            modules=dict(root.named_modules()),
            constants=Constants(state.modules, state.attributes),
            audit=Audit(state, (*root.parameters(), *root.buffers())),
            storages=Storages(subject.storage_numbers),
            settings=Settings(),
        )
