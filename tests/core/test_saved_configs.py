"""What a saved config contains, and what is read from one."""

import json

from hf_ft import AMCFConfig, BlockwiseConfig, FTConfig, load_configs
from hf_ft.core.config import as_saved


def test_it_tells_no_folder_of_this_machine(tmp_path):
    AMCFConfig(source_models=("/home/ann/models/first", "google/vit"), storage="/home/ann/s.db").save_pretrained(
        tmp_path
    )
    assert "ann" not in (tmp_path / "ft_config.json").read_text()
    assert FTConfig.from_pretrained(tmp_path) == AMCFConfig(source_models=("first", "google/vit"))


def test_a_file_from_elsewhere_does_not_choose_what_is_opened(tmp_path):
    (tmp_path / "ft_config.json").write_text(
        json.dumps({"strategies": [{"ft_type": "blockwise", "storage": "mysql://host/studies", "top": 2}]})
    )
    (read,) = load_configs(tmp_path)
    assert read.storage is None and read.top == 2


def test_a_config_as_saved_is_read_as_itself(tmp_path):
    config = BlockwiseConfig(top=2, storage="blocks.db")
    config.save_pretrained(tmp_path)
    assert FTConfig.from_pretrained(tmp_path) == as_saved(config) == BlockwiseConfig(top=2, norm_mode=config.norm_mode)
