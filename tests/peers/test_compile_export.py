"""torch.compile, torch.export and torch.jit.trace: one program for all sizes, with the numbers of the plain model."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import siglip_hf

from . import tiny

MODELS = ["joint", "text", "vision", "classifier"]


def model_and_inputs(name: str, texts: int = 3, images: int = 2) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    input_ids, pixel_values = tiny.texts(texts), tiny.pictures(images)
    if name == "classifier":
        return tiny.classifier(), {"pixel_values": pixel_values}
    joint = tiny.joint_model()
    if name == "text":
        return joint.text_model, {"input_ids": input_ids}
    if name == "vision":
        return joint.vision_model, {"pixel_values": pixel_values}
    return joint, {"input_ids": input_ids, "pixel_values": pixel_values}


@torch.no_grad()
def assert_same(program, model: torch.nn.Module, **inputs) -> None:
    output, expected = program(**inputs), model(**inputs)
    tensors = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    assert tensors
    for key in tensors:
        torch.testing.assert_close(output[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph_for_all_batch_sizes(name, attention):
    torch._dynamo.reset()
    model, _ = model_and_inputs(name)
    model.set_attn_implementation(attention)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    # First sizes that no other dimension has: PyTorch takes equal ones to be the same.
    for texts, images in ((5, 6), (7, 4), (3, 2), (2, 9), (8, 8)):
        assert_same(compiled, model, **model_and_inputs(name, texts, images)[1])
    assert backend.frame_count == 1


def test_compiles_without_being_told_that_sizes_vary():
    """PyTorch then makes a graph for the first size, and one for all others."""
    torch._dynamo.reset()
    model = tiny.joint_model()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for texts, images in ((3, 2), (5, 4), (7, 3), (2, 9), (6, 6)):
        assert_same(compiled, model, **model_and_inputs("joint", texts, images)[1])
    assert backend.frame_count == 2


def test_compiles_to_one_graph_for_all_picture_sizes_and_text_lengths():
    torch._dynamo.reset()
    model = tiny.joint_model()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size, length in (((48, 40), 8), ((64, 72), 12), ((40, 56), 5), ((24, 88), 15)):
        inputs = {"input_ids": tiny.texts(3, length), "pixel_values": tiny.pictures(2, *size)}
        assert_same(compiled, model, **inputs, interpolate_pos_encoding=True)
    assert backend.frame_count == 1


def test_compiled_training_step():
    """Gradients through a compiled model are those of the plain one."""
    torch._dynamo.reset()
    gradients = []
    for compile_it in (False, True):
        model = tiny.joint_model()
        run = torch.compile(model, backend="aot_eager") if compile_it else model
        run(input_ids=tiny.texts(2), pixel_values=tiny.pictures(2), return_loss=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_export_with_dynamic_batch(name):
    model, inputs = model_and_inputs(name)
    dynamic = {key: {0: Dim.DYNAMIC} for key in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic).module()
    for texts, images in ((1, 1), (7, 5), (3, 2)):
        assert_same(program, model, **model_and_inputs(name, texts, images)[1])


@pytest.mark.parametrize("size", [(48, 40), (32, 32)], ids=["other size", "own size"])
def test_export_with_dynamic_text_length_and_picture_size(size):
    """Also where the example has the configured size, for which the plain model would not interpolate."""
    model = tiny.joint_model()
    inputs = {"input_ids": tiny.texts(3, 8), "pixel_values": tiny.pictures(2, *size), "interpolate_pos_encoding": True}
    dynamic = {
        "input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
        "interpolate_pos_encoding": None,
    }
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic).module()
    for texts, length, images, height, width in ((1, 16, 3, 72, 56), (4, 5, 1, 32, 32), (2, 3, 2, 24, 88)):
        input_ids, pixel_values = tiny.texts(texts, length), tiny.pictures(images, height, width)
        assert_same(program, model, input_ids=input_ids, pixel_values=pixel_values, interpolate_pos_encoding=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_traced_model_is_right_for_other_batch_sizes(name, attention):
    model, inputs = model_and_inputs(name)
    model.set_attn_implementation(attention)
    model.config.return_dict = False  # torch.jit takes tensors and tuples only
    traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
    for texts, images in ((7, 5), (1, 1), (4, 4)):
        _, inputs = model_and_inputs(name, texts, images)
        output, expected = traced(**inputs), model(**inputs)
        assert len(output) == len(expected)
        assert len(output[0]) in (texts, images)
        for tensor, expected_tensor in zip(output, expected, strict=True):
            torch.testing.assert_close(tensor, expected_tensor, rtol=1e-5, atol=1e-5)


def test_exported_program_is_saved_whole(tmp_path):
    model = tiny.joint_model().vision_model
    program = torch.export.export(
        model, (), {"pixel_values": tiny.pictures()}, dynamic_shapes={"pixel_values": {0: Dim.DYNAMIC}}
    )
    torch.export.save(program, tmp_path / "vision.pt2")
    loaded = torch.export.load(tmp_path / "vision.pt2").module()
    with torch.no_grad():
        output = loaded(pixel_values=tiny.pictures(4))
    assert type(output) is siglip_hf.models.modeling_siglip.SiglipPoolingOutput
    torch.testing.assert_close(output.pooler_output, model(tiny.pictures(4)).pooler_output, rtol=1e-5, atol=1e-5)
