"""How far a long call is: one kind of callback for the whole library.

Sentences about what is being done go to the logger `mgn_deploy` at level INFO; warnings are what a caller should see in
any case. A library caller sees neither progress nor INFO unless it asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Called as (step, done, total): the name of the step, as in "embedding", and how much of it is done.
Progress: TypeAlias = Callable[[str, int, int], None]
