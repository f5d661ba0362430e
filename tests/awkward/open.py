"""What is not as it should be yet, by name: the reason. Strict: a model that is mended has to leave the table."""

from __future__ import annotations

_COULD_BE_RIGHT = "refused with a clear error, though it could be right: "
_NOT_CLEAR = "refused, but the error does not tell the reason: "

OPEN: dict[str, str] = {
    "root_remembers_loss": "what the root's forward leaves on itself is not set by the parts",
    "block_remembers_scores": "what an entered block's forward leaves on itself is not set by the parts",
    "vmap_at_root": _NOT_CLEAR + "a layer inside vmap, recorded while functorch's layers are being undone",
    "tensor_subclass": _NOT_CLEAR + "it should name the tensor's class",
    "half_of_size": _COULD_BE_RIGHT + "floats that follow from sizes",
    "shape_numel": _COULD_BE_RIGHT + "x.shape.numel()",
    "size_in_lru_cache": _COULD_BE_RIGHT + "a table kept by lru_cache, made in one recording and met in the next",
    "parametrised": _COULD_BE_RIGHT + "parametrize.cached() keeps the weight",
    "modules_for_leaf": _COULD_BE_RIGHT + "a block without modules that is handed some",
}
OPEN_UNVERIFIED: dict[str, str] = {  # only with verify=False
    "scripted_function": "silently wrong: gradients stop at a scripted function",
    "scripted_function_at_root": "silently wrong: gradients stop at a scripted function",
    "global_settings": "silently wrong: sdpa_kernel around functions is lost",
    "grad_mode_asked": "silently wrong: torch.is_grad_enabled() is not guarded",
    "read_one_call_later": "silently wrong: a block reads what another one left on itself at the call before",
    "nested_tensors": _NOT_CLEAR + "jagged tensors as constants",
}
_SEEN_BY_VERIFY = (
    "scripted_function",
    "scripted_function_at_root",
    "global_settings",
    "grad_mode_asked",
    "read_one_call_later",
)
OPEN_VERIFIED: dict[str, str] = dict.fromkeys(  # only with verify=True
    _SEEN_BY_VERIFY, _NOT_CLEAR + "verify only sees that something differs"
)
