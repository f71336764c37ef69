"""The exported values are those with which Transformers' processors prepare images; random samples."""

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from hf_ft.exports.graph import Example
from hf_ft.exports.processing import image_steps, prepared_image
from hf_ft.exports.random_inputs import random_inputs
from hf_ft.inference import Trained
from hf_ft.inference.batches import Batches
from hf_ft.testing.families import tiny

SQUARE, EDGE = {"height": 40, "width": 30}, {"shortest_edge": 36}
PROCESSORS = {
    "square": hf.ViTImageProcessorPil(size=SQUARE, image_std=[0.2, 0.3, 0.4]),
    "crop": hf.CLIPImageProcessorPil(size=EDGE, crop_size={"height": 32, "width": 30}),
    "padding": hf.CLIPImageProcessorPil(size={"shortest_edge": 21}, crop_size={"height": 32, "width": 40}),
    "percentage": hf.ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875),
    "large": hf.ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "offset": hf.EfficientNetImageProcessorPil(size=SQUARE, rescale_offset=True, include_top=False, resample=3),
    "bgr": hf.MobileViTImageProcessorPil(size=EDGE, crop_size=SQUARE),
    "unscaled": hf.ViTImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
    "as it is": hf.ViTImageProcessorPil(do_resize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(50, 37), (20, 61)])
def test_images_are_prepared_as_by_the_processor(name, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor, image = PROCESSORS[name], Image.fromarray(pixels)
    wanted = processor(images=[image], return_tensors="np")["pixel_values"][0]
    found = prepared_image(image, image_steps(processor))
    np.testing.assert_allclose(found, wanted, atol=2e-5 if wanted.max() > 10 else 1e-6)


def test_unsupported_processing_steps_give_none():
    assert image_steps(hf.ViTImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 40})) is None


def test_random_sounds_can_be_read_and_their_length_is_free():
    trained = Trained.of(tiny("Wav2Vec2ForSequenceClassification"), hf.Wav2Vec2FeatureExtractor())
    batches = Batches(trained, random_inputs(trained), 3, seconds=1.2)
    example = Example.of(batches, "audio")
    assert example.axes["input_values"] == {0: "batch", 1: "length"} and not batches[0].errors
    assert len(example.inputs["input_values"]) == 2
