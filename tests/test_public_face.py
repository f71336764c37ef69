"""Every name that a user may import since version 0.1.0 is still where it was."""

import importlib
import types

import pytest

import hf_ft

# By module. Additions to the package need not be added here; nothing here may be removed.
NAMES = {
    "hf_ft": """
        AMCFConfig Anatomy AnatomyError AttentionTransferConfig BSSConfig BatchNormStatistics BlockScores
        BlockSearch BlockwiseConfig CheckpointError CoTuningConfig CollaborativeConfig
        CollaborativeImageProcessor CollaborativeModel CollaborativeTokenizer Context DAFTConfig DELTAConfig
        FTConfig FTTrainer FrozenCache FullConfig GradualUnfreezingConfig L2SPConfig LPFTConfig
        LayerDecayConfig LinearProbeConfig LwFConfig Objective OptionError Paper Part Plan Rate Recommended
        Run SoftConfig Stage State Stream SwarmScores SwarmSearch TREDConfig TaskLoss Term View advise anatomy
        collaborative_loss compare compose config_class convert_batch_norm diagnostics estimate_batch_norm
        from_pretrained load_configs load_delta load_sources load_weights option register set_up
    """,
    "hf_ft.advice": """
        Advice Reason Recommendation Shift Signals advise how_often_right recommend
    """,
    "hf_ft.comparison": """
        Contender Data Results Settings Training compare
    """,
    "hf_ft.data": """
        AUGMENTATIONS Columns ROW TEST_NAMES Unreadable VALIDATION_NAMES check_images collate find_columns
        flip_and_shift image_transform load_split load_splits open_rgb prepare text_transform unlabelled
    """,
    "hf_ft.diagnostics": """
        Discrimination Distortion Distortions FEATURES FeatureDistortionCallback GeneralDiscriminationCallback
        feature_distortion general_discrimination plot_discrimination plot_disentangling plot_distortion
    """,
    "hf_ft.functional": """
        BANDWIDTHS as_positions attention_distance attention_map batch_spectral_shrinkage club_upper_bound
        collaborative_loss disagreement distillation_loss feature_distance gaussian_bandwidths
        gaussian_log_likelihood l2_sp mmd2 pooled wide
    """,
    "hf_ft.metrics": """
        Accuracy BalancedAccuracy Kind LOCAL_METRICS MacroF1 MeanAbsoluteError MeanSquaredError Scores
        classification_metrics compute_metrics predictions_and_references
    """,
    "hf_ft.testing": """
        LAWS TINY_MODELS check_strategy same_tensors still suited tiny_bert tiny_collaborative tiny_data
        tiny_inputs tiny_resnet tiny_vit train
    """,
    "hf_ft.testing.models": """
        TINY_MODELS tiny_bert tiny_collaborative tiny_convnext tiny_deit tiny_distilbert tiny_efficientnet
        tiny_inputs tiny_mobilenet_v1 tiny_mobilenet_v2 tiny_regnet tiny_resnet tiny_roberta tiny_swin
        tiny_timm tiny_vit
    """,
    "hf_ft.testing.training": """
        equipped make_trainer same_tensors snapshot still tiny_arguments tiny_batch tiny_data train
    """,
    "hf_ft.trainer": """
        ClassWeights FTTrainer
    """,
    "hf_ft.zoo": """
        DATASETS DATA_NOTICES GATES SHORT_NAMES ShortName Task elpv freeze_pinned_gates from_pretrained
        load_by_position load_model mnist5k stratified_split task_of uci_digits
    """,
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there(module):
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert not missing


def test_the_package_lists_its_names():
    names = set(NAMES["hf_ft"].split())
    assert names <= set(hf_ft.__all__) and names <= set(dir(hf_ft))
    star = {}
    exec("from hf_ft import *", star)
    assert names <= set(star)


def test_functions_are_not_hidden_by_modules_of_their_names():
    """`hf_ft.anatomy` is a function, whatever is imported, and in whatever order."""
    for module in NAMES:
        importlib.import_module(module)
    for module, names in NAMES.items():
        found = importlib.import_module(module)
        hidden = [name for name in names.split() if isinstance(getattr(found, name), types.ModuleType)]
        assert hidden == (["diagnostics"] if module == "hf_ft" else [])


def test_one_name_is_one_thing():
    """A name in two places is the same object, so that `except` and `isinstance` work with either."""
    pairs = [
        ("hf_ft", "hf_ft.advice", "advise"),
        ("hf_ft", "hf_ft.comparison", "compare"),
        ("hf_ft", "hf_ft.functional", "collaborative_loss"),
        ("hf_ft", "hf_ft.trainer", "FTTrainer"),
        ("hf_ft", "hf_ft.zoo", "from_pretrained"),
        ("hf_ft.testing", "hf_ft.testing.models", "tiny_resnet"),
        ("hf_ft.testing", "hf_ft.testing.training", "train"),
    ]
    for one, other, name in pairs:
        assert getattr(importlib.import_module(one), name) is getattr(importlib.import_module(other), name), name
