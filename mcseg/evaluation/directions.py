"""Direction of a score: whether a higher or a lower value is better, from its name."""

from typing import Literal

Mode = Literal["min", "max"]  # as Lightning and torch call it

# Endings of words that name a quantity to minimise or to maximise; a part of a name with both (`dice_loss`) is minimised
_LOWER = ("loss", "error", "err", "entropy", "distance", "perplexity", "hausdorff", "miss", "misses", "alarms")
_HIGHER = (
    "iou", "jaccard", "dice", "accuracy", "acc", "precision", "recall", "sensitivity", "specificity", "score", "tail",
)  # fmt: skip
# Whole words, most of them abbreviations that are also the end of other words
_LOWER_WORDS = {
    "ece", "mce", "ace", "nll", "brier", "ce", "bce", "kl", "mae", "mse", "rmse", "hd", "hd95", "assd", "asd", "norm", "fpr",
    "fnr", "ppl",
}  # fmt: skip
_HIGHER_WORDS = {
    "f1", "f2", "auc", "auroc", "aupr", "ap", "map", "pq", "sq", "rq", "kappa", "mcc", "psnr", "ssim", "nsd", "dsc", "r2",
}  # fmt: skip


def better_mode(score: str) -> Mode | None:
    """Return whether the minimum or the maximum of a score is its best value.

    The first part of the name, between slashes, that names a known quantity decides, so that a class may have any name.

    Args:
        score: Name under which the score is logged.

    Returns:
        ``"min"``, ``"max"``, or None if the name does not tell.

    Example:
        >>> from mcseg.evaluation.directions import better_mode
        >>> [better_mode(score) for score in ("val/miou", "val/iou/loss", "val/loss", "train/grad_norm", "lr")]
        ['max', 'max', 'min', 'min', None]
    """
    for part in score.lower().split("/"):
        words = part.replace("-", "_").replace(".", "_").split("_")
        if any(word in _LOWER_WORDS or word.endswith(_LOWER) for word in words):
            return "min"
        if any(word in _HIGHER_WORDS or word.endswith(_HIGHER) for word in words):
            return "max"
    return None
