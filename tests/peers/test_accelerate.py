"""accelerate: its savers keep every weight, offloaded models give the outputs of the whole one, its loaders are loud.

`test_device_map.py` has what `from_pretrained(device_map=...)` does with accelerate.
"""

import accelerate
import pytest
import torch
from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model

from . import families


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("name", families.CLASSES)
@pytest.mark.parametrize("dtype", families.DTYPES, ids=str)
def test_save_model(name, dtype, folder_of, accelerator, tmp_path):
    """What `save_model` writes beside the configuration is a checkpoint with every weight."""
    model = families.model_class(name).from_pretrained(folder_of(name, dtype), dtype=dtype)
    families.assert_nothing_shared(model)
    accelerator.save_model(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    reloaded, info = families.model_class(name).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    families.assert_same_weights(reloaded, model)


@pytest.mark.parametrize("name", families.CLASSES)
def test_save_model_in_shards(name, folder_of, accelerator, tmp_path):
    model = families.model_class(name).from_pretrained(folder_of(name))
    accelerator.save_model(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model.config.save_pretrained(tmp_path)
    families.assert_same_weights(families.model_class(name).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", families.CLASSES)
def test_a_run_is_resumed(name, folder_of, tmp_path):
    """`save_state`, more training, `load_state`: weights and optimizer are those of the moment of saving."""
    accelerator = Accelerator(cpu=True)
    plain = families.model_class(name).from_pretrained(folder_of(name))
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))

    def step() -> None:
        outputs = model(**families.inputs_of(name))
        loss = sum(value.float().square().mean() for key, value in outputs.items() if key in families.OUTPUTS)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    expected = families.outputs_of(model, name)
    accelerator.save_state(tmp_path)
    step()
    assert any((value - expected[key]).abs().max() > 1e-6 for key, value in families.outputs_of(model, name).items())
    accelerator.load_state(tmp_path)
    families.assert_same(families.outputs_of(model, name), expected)


@pytest.mark.parametrize("name", families.CLASSES)
@pytest.mark.parametrize("dtype", families.DTYPES, ids=str)
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offload(name, dtype, offload, folder_of, tmp_path):
    """A model whose weights lie in memory or on disk, and come one layer at a time, gives the whole model's outputs."""
    model = families.model_class(name).from_pretrained(folder_of(name, dtype), dtype=dtype)
    expected = families.outputs_of(model, name, dtype)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    output = families.outputs_of(model, name, dtype)
    families.assert_rounds_alike(output, expected, dtype)


@pytest.mark.parametrize("name", families.CLASSES)
def test_load_checkpoint_in_model(name, folder_of):
    """Without a device map it calls `load_state_dict`, which takes the published names."""
    model = families.make(name, seed=1)
    load_checkpoint_in_model(model, folder_of(name))
    families.assert_same_weights(model, families.make(name))


@pytest.mark.parametrize("name", families.WITH_HEAD)
def test_load_checkpoint_and_dispatch_of_published_names(name, folder_of, caplog):
    """With one it assigns tensor by tensor and knows no conversion: it says so, or fails, as docs/sharding.md tells."""
    config = families.make(name).config
    with pytest.raises((ValueError, AttributeError), match="in_proj"):
        load_checkpoint_and_dispatch(
            families.model_class(name)(config), folder_of(name), device_map={"": "cpu"}, strict=True
        )
    with init_empty_weights():
        model = families.model_class(name)(config)
    with pytest.raises(NotImplementedError, match="meta"):
        load_checkpoint_and_dispatch(model, folder_of(name), device_map={"": "cpu"})
    assert "head.attention.in_proj_weight" in caplog.text


@pytest.mark.parametrize("name", families.CLASSES)
def test_load_checkpoint_and_dispatch_of_a_saved_model(name, folder_of, accelerator, tmp_path):
    reference = families.model_class(name).from_pretrained(folder_of(name))
    accelerator.save_model(reference, tmp_path)
    with init_empty_weights():
        model = families.model_class(name)(reference.config)
    model = load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})
    families.assert_same(families.outputs_of(model, name), families.outputs_of(reference, name))
