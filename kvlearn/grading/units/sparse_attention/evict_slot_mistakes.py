"""05.4: the mistakes that people make when they count the slots."""

from torch import Tensor

from kvlearn.grading.units.sparse_attention.evict import kept
from kvlearn.grading.units.sparse_attention.evict_mistakes import EXERCISE

__all__ = ["EXERCISE"]


@EXERCISE.misconception("slots for what a step reads", tokens_to_keep=kept)
def reads(mask: Tensor) -> int:
    """The widest row of the pattern was counted: what a step *reads*. A pattern that reads few tokens may
    have to store all of them, because each step reads others. Slots are for what is kept."""
    return int(mask.sum(1).max())


@EXERCISE.misconception("slots for the last step", tokens_to_keep=kept)
def at_the_end(mask: Tensor) -> int:
    """What is kept at the end was counted. Earlier steps may need more: before a global token attends,
    everything is there. A cache must be large enough for the worst step."""
    return int(kept(mask)[-1].sum())


@EXERCISE.misconception("slots for the average step", tokens_to_keep=kept)
def average(mask: Tensor) -> float:
    """The mean over all steps was taken. Half of the steps would find the cache full: take the largest."""
    return float(kept(mask).sum(1).double().mean())


@EXERCISE.misconception("a slot for every token", tokens_to_keep=kept)
def every_token(mask: Tensor) -> int:
    """N slots were counted, as for a full cache. A slot whose token is done with can be used again, so it
    takes only as many as are kept at once."""
    return len(mask)


@EXERCISE.misconception("all steps added up", tokens_to_keep=kept)
def added(mask: Tensor) -> int:
    """The tokens kept were added up over all steps. A token that stays ten steps stays in one slot: what
    counts is how many there are at the same time."""
    return int(kept(mask).sum())


@EXERCISE.misconception("the step in place of its number of tokens", tokens_to_keep=kept)
def which_step(mask: Tensor) -> int:
    """argmax says *when* most is kept. Asked for is how much that is: max."""
    return int(kept(mask).sum(1).argmax())


@EXERCISE.misconception("the longest stay of a token", tokens_to_keep=kept)
def longest_stay(mask: Tensor) -> int:
    """The sums go down the columns: how many steps the most patient token stays. Slots are counted along the
    rows: how many tokens there are at one step."""
    return int(kept(mask).sum(0).max())


@EXERCISE.misconception("no slot for the new token", tokens_to_keep=kept)
def older_only(mask: Tensor) -> int:
    """Only older tokens were counted. The new one is written before it attends and takes a slot too."""
    return int(kept(mask).tril(-1).sum(1).max())


@EXERCISE.misconception("one slot too many for the new token", tokens_to_keep=kept)
def one_more(mask: Tensor) -> int:
    """A slot was added for the new token, which is among those that are kept already: a window of W takes W
    slots."""
    return int(kept(mask).sum(1).max()) + 1
