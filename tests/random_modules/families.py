"""How often which snippets are taken."""

from __future__ import annotations

from tests.random_modules.snippets import CONVERSIONS, LAYERS, PARAMETERS, PURE, Snippet
from tests.random_modules.stateful import ATTRIBUTES, BUFFERS, BY_VALUE, CONSTANTS, IN_PLACE

# Weight and snippets. Blocks may do what makes a capture keep them whole; the root may not.
FAMILIES: list[tuple[int, list[Snippet]]] = [
    (34, LAYERS),
    (8, PARAMETERS),
    (30, PURE),
    (14, IN_PLACE),
    (5, BUFFERS),
    (5, CONSTANTS),
]
IN_BLOCKS = [(3, BY_VALUE), (3, ATTRIBUTES)]
IN_ROOT = [(1, ATTRIBUTES)]

_ALL = [LAYERS, PARAMETERS, PURE, IN_PLACE, BUFFERS, CONSTANTS, ATTRIBUTES, BY_VALUE, CONVERSIONS]
EVERY_SNIPPET = [snippet for family in _ALL for snippet in family if not snippet.pending]
PENDING_SNIPPETS = [snippet for family in _ALL for snippet in family if snippet.pending]
