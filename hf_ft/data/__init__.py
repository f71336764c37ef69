"""Loading and preparing data: from files and data sets to model batches."""

from hf_ft.data.augment import AUGMENTATIONS, flip_and_shift
from hf_ft.data.check_results import DataChecks
from hf_ft.data.checking import check_data
from hf_ft.data.columns import ROW, Columns, find_columns, unlabelled
from hf_ft.data.images import Unreadable, check_images, open_rgb
from hf_ft.data.load import TEST_NAMES, VALIDATION_NAMES, load_split, load_splits
from hf_ft.data.mixing import Mixing
from hf_ft.data.on_duplicates import checked
from hf_ft.data.prepare import collate, image_transform, prepare, text_transform
from hf_ft.data.sounds import open_sound, sound_transform

__all__ = [
    "AUGMENTATIONS",
    "Columns",
    "DataChecks",
    "Mixing",
    "ROW",
    "TEST_NAMES",
    "Unreadable",
    "VALIDATION_NAMES",
    "check_data",
    "check_images",
    "checked",
    "collate",
    "find_columns",
    "flip_and_shift",
    "image_transform",
    "load_split",
    "load_splits",
    "open_rgb",
    "open_sound",
    "prepare",
    "sound_transform",
    "text_transform",
    "unlabelled",
]
