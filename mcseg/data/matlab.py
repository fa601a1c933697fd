"""Read masks from MATLAB files, the format of COCO-Stuff 10k and the Semantic Boundaries Dataset (SBD)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcseg.data.files import FileReader, MaskSurvey, Sample, count_labels, mask_path
from mcseg.data.labels import DataError, MissingFileError
from mcseg.messages import one_line


@dataclass(frozen=True)
class MatReader(FileReader):
    """Reader of masks in ``.mat`` files; all `~mcseg.data.files.FileReader` reads all other files."""

    def _stored(self, path: Path) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8] | None]:
        return (read_mat(path), None) if path.suffix == ".mat" else super()._stored(path)

    def _stored_size(self, path: Path) -> tuple[int, int] | None:
        if path.suffix != ".mat":
            return super()._stored_size(path)
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file")
        return None

    def survey(self, sample: Sample) -> MaskSurvey:
        """Count the pixels of each class in the mask, without palette."""
        if mask_path(sample).suffix != ".mat":
            return super().survey(sample)
        return MaskSurvey(count_labels(self.mask(sample), self.table.num_classes))


def read_mat(path: Path) -> NDArray[np.integer[Any]]:
    """Read the label map of a ``.mat`` file (version 5): variable ``S`` of COCO-Stuff, ``GTcls.Segmentation`` of SBD.

    Returns:
        (H,W) integers as stored.

    Raises:
        DataError: The file cannot be read, or contains neither variable.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["S", "GTcls"])
        values: NDArray[Any] = content["S"] if "S" in content else content["GTcls"]["Segmentation"][0, 0]
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except KeyError:
        raise DataError(f"{path}: expected the variable S (COCO-Stuff) or GTcls.Segmentation (SBD), found neither") from None
    except Exception as error:  # on a broken file the parser can raise any exception
        raise DataError(f"{path}: cannot be read ({one_line(error)}); replace or remove the file") from None
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.integer) or (values == np.rint(values)).all()):
        raise DataError(f"{path}: found an array of {values.dtype} with shape {values.shape}, expected (H,W) whole numbers")
    return values if np.issubdtype(values.dtype, np.integer) else values.astype(np.int64)
