"""NaFlex models against stock with the same weights, against themselves unpadded and packed, and saved both ways."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification
from transformers.models.siglip2 import modeling_siglip2 as stock_modeling

import siglip_hf
from siglip_hf import (
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessorFast,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2TextModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipModel,
)
from siglip_hf.models.naflex import Seen, pack, resize_weights, resized_positions
from tiny import shaken
from tiny import tiny_config as tiny_fixed_config
from tiny_siglip2 import LENGTH, NAFLEX_VISION, SHAPES, stock_pair, tiny_config, tiny_pictures, tiny_texts

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IMPLEMENTATIONS = ("eager", "sdpa")


def close(actual: torch.Tensor, expected: torch.Tensor, **tolerance) -> None:
    torch.testing.assert_close(actual, expected, **(CLOSE | tolerance))


@pytest.fixture(scope="module")
def model() -> Siglip2Model:
    return shaken(Siglip2Model(tiny_config()))


# Positions


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (14, 18), (33, 7), (1, 256), (64, 40), (3, 80)])
def test_positions_are_those_of_antialiased_interpolation(shape):
    table = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    image = table.view(1, 16, 16, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, shape, mode="bilinear", antialias=True, align_corners=False)
    count = math.prod(shape)
    actual = resized_positions(table, (16, 16), torch.tensor(shape).expand(count, 2), torch.arange(count))
    close(actual, expected[0].flatten(1).t(), atol=2e-6)


def test_positions_of_pictures_one_patch_wide():
    # Stock is wrong here: torch's CPU kernel (2.13) gives all rows the value of the first where the width is 1.
    table = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    upright = resized_positions(table, (4, 4), torch.tensor([17, 1]).expand(17, 2), torch.arange(17))
    mirrored = table.view(4, 4, 8).transpose(0, 1).reshape(16, 8)
    lying = resized_positions(mirrored, (4, 4), torch.tensor([1, 17]).expand(17, 2), torch.arange(17))
    close(upright, lying)
    image = mirrored.view(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, (1, 17), mode="bilinear", antialias=True, align_corners=False)
    close(upright, expected[0, :, 0].t())


def test_positions_of_a_grid_that_is_not_square_and_of_half_precision():
    table = torch.randn(15, 8, generator=torch.Generator().manual_seed(0)).half()
    image = table.float().view(1, 3, 5, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, (4, 2), mode="bilinear", antialias=True, align_corners=False)
    actual = resized_positions(table, (3, 5), torch.tensor([4, 2]).expand(8, 2), torch.arange(8))
    assert actual.dtype == torch.float16
    close(actual.float(), expected[0].flatten(1).t(), atol=1e-3)


def test_resize_weights_sum_to_one_and_select_on_the_same_grid():
    weights = resize_weights(torch.arange(9), torch.full((9,), 9), 4)
    close(weights.sum(dim=-1), torch.ones(9))
    close(resize_weights(torch.arange(5), torch.full((5,), 5), 5), torch.eye(5))


# Packing


def test_packing_gives_every_patch_a_place_of_its_own():
    lengths = [20, 6, 1, 20, 17, 16, 3, 3]
    packing = pack(lengths)
    assert packing.length == 20
    assert packing.rows == 5  # 86 patches in rows of 20
    assert packing.pictures.tolist() == [picture for picture, n in enumerate(lengths) for _ in range(n)]
    assert packing.patches.tolist() == [patch for n in lengths for patch in range(n)]
    assert len(set(packing.slots.tolist())) == sum(lengths)
    ids = packing.picture_ids()
    assert ids.shape == (5, 20)
    assert [(ids == picture).sum().item() for picture in range(len(lengths))] == lengths
    for picture in range(len(lengths)):  # no picture is torn between rows
        assert (ids == picture).any(dim=1).sum() == 1


def test_packing_fills_and_gives_back():
    packing = pack([2, 3, 1])
    tokens = torch.arange(1.0, 7.0).unsqueeze(-1)
    padded = packing.by_picture(packing.fill(tokens), 4).squeeze(-1)
    assert padded.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [6, 0, 0, 0]]


# Same numbers as stock


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_head", [True, False])
def test_vision_model_equals_stock(implementation, use_head):
    config = Siglip2VisionConfig(**NAFLEX_VISION, vision_use_head=use_head)
    stock, ours = stock_pair("Siglip2VisionModel", config, implementation)
    inputs = tiny_pictures()
    with torch.no_grad():
        expected = stock(**inputs, output_hidden_states=True)
        actual = ours(**inputs, output_hidden_states=True)
    close(actual.last_hidden_state, expected.last_hidden_state)
    assert len(actual.hidden_states) == 3
    for a, e in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(a, e)
    if use_head:
        close(actual.pooler_output, expected.pooler_output)
    else:
        assert actual.pooler_output is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_model_equals_stock(implementation):
    stock, ours = stock_pair("Siglip2Model", attn_implementation=implementation)
    inputs = tiny_pictures() | {"input_ids": tiny_texts(len(SHAPES))}
    with torch.no_grad():
        expected, actual = stock(**inputs), ours(**inputs, return_loss=True)
    close(actual.image_embeds, expected.image_embeds)
    close(actual.text_embeds, expected.text_embeds)
    close(actual.logits_per_image, expected.logits_per_image, atol=1e-4)
    close(actual.logits_per_text, expected.logits_per_text, atol=1e-4)
    close(ours.encode_image(**tiny_pictures()), expected.image_embeds)
    close(ours.encode_text(inputs["input_ids"]), expected.text_embeds)
    close(ours.get_image_features(**tiny_pictures()).pooler_output, stock.get_image_features(**tiny_pictures())[1])
    signs = 2 * torch.eye(len(SHAPES)) - 1
    close(actual.loss, -nn.functional.logsigmoid(signs * actual.logits_per_text).sum(dim=1).mean(), atol=1e-4)


def test_text_model_equals_stock():
    config = Siglip2TextConfig(**tiny_config().text_config.to_dict() | {"projection_size": 24})
    stock, ours = stock_pair("Siglip2TextModel", config)
    ids = tiny_texts(3)
    close(ours(ids).pooler_output, stock(ids).pooler_output)


@pytest.mark.parametrize("with_mask", [True, False])
def test_classifier_equals_stock(with_mask):
    stock, ours = stock_pair("Siglip2ForImageClassification", tiny_config(num_labels=3))
    inputs = tiny_pictures()
    expected = stock(**inputs).logits
    if not with_mask:
        inputs.pop("pixel_attention_mask")
    close(ours(**inputs).logits, expected)
    close(ours(**inputs, packed=True).logits, expected)


def test_attention_weights_equal_stocks_and_the_heads_come_along():
    stock, ours = stock_pair("Siglip2VisionModel", Siglip2VisionConfig(**NAFLEX_VISION), "eager")
    inputs = tiny_pictures()
    expected, actual = stock(**inputs, output_attentions=True), ours(**inputs, output_attentions=True)
    for a, e in zip(actual.attentions, expected.attentions, strict=True):
        close(a, e)
    (weights,) = actual.cross_attentions
    assert weights.shape == (len(SHAPES), 4, 1, LENGTH)
    assert (weights[:, :, 0] * (1 - inputs["pixel_attention_mask"][:, None])).abs().max() == 0
    ours.set_attn_implementation("sdpa")  # computes with eager for those who ask for weights
    close(ours(**inputs, output_attentions=True).attentions[0], expected.attentions[0])


def test_half_precision_stays_close():
    config = Siglip2VisionConfig(**NAFLEX_VISION)
    reference = shaken(Siglip2VisionModel(config))
    inputs = tiny_pictures()
    expected = reference(**inputs).pooler_output
    actual = reference.bfloat16()(**inputs).pooler_output
    assert actual.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(actual.float(), expected).min() > 0.9995


# Batch, single, unpadded and packed agree


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_single_unpadded_and_packed_agree(model, implementation):
    model.set_attn_implementation(implementation)
    inputs = tiny_pictures()
    batch = model.vision_model(**inputs)
    packed = model.vision_model(**inputs, packed=True)
    close(packed.pooler_output, batch.pooler_output)
    for index, shape in enumerate(SHAPES):
        count = math.prod(shape)
        single = model.vision_model(**{name: value[index : index + 1] for name, value in inputs.items()})
        unpadded = model.vision_model(
            inputs["pixel_values"][index : index + 1, :count], None, inputs["spatial_shapes"][index : index + 1]
        )
        for other in (single, unpadded):
            close(other.pooler_output[0], batch.pooler_output[index])
        for states in (single.last_hidden_state[0], unpadded.last_hidden_state[0], packed.last_hidden_state[index]):
            close(states[:count], batch.last_hidden_state[index, :count])
    assert packed.last_hidden_state[2, 1:].abs().max() == 0


def test_the_order_of_the_batch_and_what_is_in_the_padding_do_not_matter(model):
    inputs = tiny_pictures()
    expected = model.encode_image(**inputs, packed=False)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for packed in (False, True):
        shuffled = {name: value[order] for name, value in inputs.items()}
        close(model.encode_image(**shuffled, packed=packed), expected[order])
        dirty = inputs | {"pixel_values": inputs["pixel_values"] + 7 * (1 - inputs["pixel_attention_mask"][..., None])}
        close(model.encode_image(**dirty, packed=packed), expected)


def test_encode_image_packs_by_itself_where_it_pays(model, monkeypatch):
    lengths = []
    forward = type(model.vision_model.encoder).forward
    monkeypatch.setattr(
        type(model.vision_model.encoder),
        "forward",
        lambda self, states, *args, **kwargs: (
            lengths.append(states.shape[:2]) or forward(self, states, *args, **kwargs)
        ),
    )
    inputs = tiny_pictures()
    model.encode_image(**inputs)
    model.encode_image(**tiny_pictures(((4, 5), (2, 10))))  # nothing to gain
    model.encode_image(**inputs, packed=False)
    assert lengths == [(5, 20), (2, 20), (6, 20)]


@pytest.mark.slow  # compiles its kernels: half a minute; see `make help`
def test_flex_attention_gives_the_same_numbers():
    # Its kernels want heads of at least 16.
    vision = shaken(
        Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX_VISION | {"hidden_size": 64, "num_hidden_layers": 1}))
    )
    inputs = tiny_pictures()
    with torch.no_grad():
        expected = vision(**inputs).pooler_output
        vision.set_attn_implementation("flex_attention")
        close(vision(**inputs).pooler_output, expected)
        close(vision(**inputs, packed=True).pooler_output, expected)


@pytest.mark.gpu
def test_flash_attention_skips_the_padding():
    pytest.importorskip("flash_attn")
    config = Siglip2VisionConfig(**NAFLEX_VISION | {"hidden_size": 64})
    vision = shaken(Siglip2VisionModel(config)).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in tiny_pictures().items()}
    with torch.no_grad():
        expected = vision(**inputs).pooler_output
        vision.set_attn_implementation("flash_attention_2")
        found = [vision(**inputs, packed=packed).pooler_output for packed in (False, True)]
    for actual in found:
        assert nn.functional.cosine_similarity(actual.float(), expected.float()).min() > 0.999


def test_packing_refuses_attention_without_masks_and_lengths():
    config = SimpleNamespace(_attn_implementation="paged|eager")
    seen = Seen.of(torch.tensor(SHAPES), None)
    with pytest.raises(ValueError, match=r"needs one of .*eager, sdpa, flex_attention, or flash .* not 'paged\|eager'"):
        Siglip2VisionModel._pack(config, seen)


def test_gradients_through_packing_equal_those_of_the_padded_batch():
    model = shaken(Siglip2Model(tiny_config())).train()
    grads = []
    for packed in (False, True):
        model.zero_grad()
        model(**tiny_pictures(), input_ids=tiny_texts(len(SHAPES)), return_loss=True, packed=packed).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(grad.abs().max() > 0 for name, grad in grads[0].items() if "k_proj.bias" not in name)
    for name, grad in grads[0].items():
        close(grads[1][name], grad, atol=1e-4, rtol=1e-4)


def test_encode_image_takes_pictures_of_any_sizes(model):
    rng = np.random.default_rng(0)
    sizes = ((40, 60), (1, 400), (5, 5), (64, 64), (30, 8))
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    pictures.append(pictures[0].convert("L"))
    processor = Siglip2ImageProcessorFast(patch_size=8, max_num_patches=16)
    expected = model.encode_image(**processor(pictures, return_tensors="pt"), packed=False)
    for options in ({}, {"packed": True}, {"packed": False}, {"max_tokens": 20}, {"max_tokens": 1}):
        close(model.encode_image(pictures, **options), expected)

    budgets = [64, 16, 4, 32, 16, 1]
    each = [
        model.encode_image(**processor(picture, return_tensors="pt", max_num_patches=budget))
        for picture, budget in zip(pictures, budgets, strict=True)
    ]
    close(model.encode_image(pictures, max_num_patches=budgets), torch.cat(each))
    close(model.encode_image(pictures, normalize=False).norm(dim=-1) > 1.1, torch.ones(6, dtype=torch.bool))


# One graph for all


@pytest.fixture(scope="module")
def one_block() -> Siglip2VisionModel:
    return shaken(Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX_VISION | {"num_hidden_layers": 1})))


def test_one_graph_for_all_batch_sizes_and_aspect_ratios(one_block):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(one_block, backend=counter, fullgraph=True, dynamic=True)
    batches = [SHAPES, SHAPES[:3], ((2, 3), (5, 2)), ((4, 4),) * 5]
    with torch.no_grad():
        for batch in batches:
            inputs = tiny_pictures(batch)
            close(compiled(**inputs).pooler_output, one_block(**inputs).pooler_output)
    assert counter.frame_count == 1


@pytest.fixture(scope="module")
def program(one_block) -> torch.export.ExportedProgram:
    """The tower with a dynamic batch size and number of patches."""
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=1024)
    sizes = {0: batch, 1: length}
    shapes = {"pixel_values": sizes, "pixel_attention_mask": sizes, "spatial_shapes": {0: batch}}
    return torch.export.export(one_block, (), kwargs=tiny_pictures(), dynamic_shapes=shapes, strict=False)


OTHER_BATCHES = ({}, {"shapes": ((5, 2), (2, 3), (1, 1)), "length": 12})


def test_exports_with_a_dynamic_batch(one_block, program):
    module = program.module()
    for other in OTHER_BATCHES:
        inputs = tiny_pictures(**other)
        close(module(**inputs).pooler_output, one_block(**inputs).pooler_output)


@pytest.mark.slow  # half a minute; see `make help`
def test_onnx_has_a_dynamic_batch(one_block, program, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, (), tmp_path / "vision.onnx", kwargs=tiny_pictures(), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    for other in OTHER_BATCHES:
        inputs = tiny_pictures(**other)
        outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        close(torch.from_numpy(outputs[1]), one_block(**inputs).pooler_output)


# Loading and saving


def test_stock_and_ours_save_the_same_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    stock = stock_modeling.Siglip2Model.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    inputs = tiny_pictures() | {"input_ids": tiny_texts()}
    close(stock(**inputs).logits_per_image, model(**inputs).logits_per_image, atol=1e-4)
    again = Siglip2Model.from_pretrained(tmp_path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


def test_auto_classes_use_ours(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Siglip2Config
    assert type(AutoModel.from_pretrained(tmp_path)) is Siglip2Model
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)) is Siglip2Model
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is Siglip2ForImageClassification
    model.vision_model.save_pretrained(tmp_path / "vision")
    vision = AutoModel.from_pretrained(tmp_path / "vision")
    assert type(vision) is Siglip2VisionModel
    close(vision(**tiny_pictures()).pooler_output, model.vision_model(**tiny_pictures()).pooler_output)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "vision")) is Siglip2ForImageClassification
    model.text_model.save_pretrained(tmp_path / "text")
    assert type(AutoModel.from_pretrained(tmp_path / "text")) is Siglip2TextModel


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipVisionModel", "SiglipForImageClassification"])
def test_naflex_weights_are_refused_by_fixed_resolution_classes(name, tmp_path):
    siglip_hf.Siglip2Model(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"NaFlex weights .*{name} is a fixed-resolution model.*load them with Siglip2"
    ):
        getattr(siglip_hf, name).from_pretrained(tmp_path)


@pytest.mark.parametrize("as_file", [True, False])
def test_naflex_classes_refuse_fixed_resolution_weights(tmp_path, as_file):
    fixed = shaken(SiglipModel(tiny_fixed_config()))
    fixed.save_pretrained(tmp_path)
    state = {} if as_file else {"state_dict": fixed.state_dict(), "config": tiny_config()}
    source = tmp_path if as_file else None
    with pytest.raises(ValueError, match=r"fixed-resolution weights .*Siglip2Model is a NaFlex.*load them with Siglip"):
        Siglip2Model.from_pretrained(source, **state)
    with pytest.raises(ValueError, match='SiglipVisionModel, and with "model_type": "siglip"'):
        Siglip2VisionModel.from_pretrained(tmp_path)


def test_return_dict_false_gives_the_same_tensors_in_order():
    model = shaken(siglip_hf.Siglip2Model(tiny_config()))
    inputs = {**tiny_pictures(), "input_ids": tiny_texts()}
    output, values = model(**inputs), model(**inputs, return_dict=False)
    torch.testing.assert_close(values[0], output.logits_per_image)
    torch.testing.assert_close(values[3], output.image_embeds)


# Mistakes


def test_wrong_inputs_are_refused(model):
    inputs = tiny_pictures()
    with pytest.raises(ValueError, match=r"needs pixel_values .* and spatial_shapes"):
        model.vision_model(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"shape \(6, 20, 100\), but .* \(B, N, 192\): 8x8 pixels"):
        model.encode_image(inputs["pixel_values"][..., :100], spatial_shapes=inputs["spatial_shapes"])
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        model.encode_image(torch.zeros(1, 3, 32, 32), spatial_shapes=inputs["spatial_shapes"][:1])
    with pytest.raises(ValueError, match=r"shape \(5, 2\); expected \(6, 2\)"):
        model.vision_model(**inputs | {"spatial_shapes": inputs["spatial_shapes"][:5]})
    with pytest.raises(ValueError, match="1 to 42 patches per picture, and pixel_values has room for 1 to 20"):
        model.vision_model(**inputs | {"spatial_shapes": torch.tensor([[6, 7], *SHAPES[1:]])})
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="6 images and 2 texts"):
        model(**inputs, input_ids=tiny_texts(), return_loss=True)
    with pytest.raises(ValueError, match="max_num_patches is for a list"):
        model.encode_image(**inputs, max_num_patches=4)


def test_configurations():
    assert Siglip2Config().vision_config.num_patches == 256
    assert Siglip2Config().text_config.model_type == "siglip2_text_model"
    again = Siglip2Config(**tiny_config().to_dict())
    assert again.to_dict() == tiny_config().to_dict()


def test_presets():
    config = Siglip2Config.from_preset("google/siglip2-so400m-patch16-naflex")
    assert (config.vision_config.hidden_size, config.vision_config.num_patches) == (1152, 256)
    assert (config.text_config.vocab_size, config.text_config.max_position_embeddings) == (256_000, 64)
    assert set(siglip_hf.NAFLEX_PRESETS) == {"siglip2-base-patch16-naflex", "siglip2-so400m-patch16-naflex"}
    with pytest.raises(ValueError, match=r"fixed resolution, see SiglipConfig.from_preset"):
        Siglip2Config.from_preset("siglip2-base-patch16-224")


def test_new_models_start_as_the_paper_says():
    torch.manual_seed(0)
    model = Siglip2Model(tiny_config())
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10
    assert model.vision_model.embeddings.position_embedding.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert model.vision_model.head.probe.abs().max() > 0.1


def test_classifier_learns_and_leaves_the_unused_head_alone():
    model = shaken(Siglip2ForImageClassification(tiny_config(num_labels=3)))
    inputs = tiny_pictures()
    model(**inputs, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if ".head." in name}
    model.config.problem_type = None
    multi_hot = torch.eye(3, dtype=torch.int64).repeat(2, 1)
    loss = model(**inputs, labels=multi_hot).loss
    expected = nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits, multi_hot.float())
    close(loss, expected)
