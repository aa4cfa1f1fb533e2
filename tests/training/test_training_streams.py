"""Training from a stream: each pair once in an epoch whoever reads it, runs that go on, and what is broken."""

import io
import json
import os
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import siglip_hf
from siglip_hf.cli.main import main
from siglip_hf.data.streams import open_stream
from siglip_hf.training import SiglipTrainer, SiglipTrainingArguments
from siglip_hf.training.run import run_training
from siglip_hf.training.settings import TrainSettings
from siglip_hf.training.streams import StreamDraws, StreamedPairs
from tiny_checkpoint import write_tiny_checkpoint
from tiny_siglip2 import write_naflex
from training_data import largest_difference, weights


def write_shards(folder, shards, each):
    """Tar shards of pairs with their numbers as captions; returns the pattern of their names."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(shard * each, shard * each + each):
                picture = io.BytesIO()
                Image.new("RGB", (20, 20), (number * 7 % 256, number * 31 % 256, number)).save(picture, "PNG")
                for name, content in (("png", picture.getvalue()), ("txt", f"the {number} cat".encode())):
                    member = tarfile.TarInfo(f"{number:04}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "s-*.tar")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", 5, 12)


def draws_of(shards, lanes, chunk=4, block=8, seed=0):
    return StreamDraws(StreamedPairs(open_stream(shards)), seed, block, lanes, chunk)


def captions(draws, numbers):
    return [draws[number].record.captions[0] for number in numbers]


# Fewer shards than lanes, as many, more; parts that divide and parts that do not.
@pytest.mark.parametrize("lanes", [1, 2, 3, 5, 6, 12])
def test_an_epoch_has_each_pair_once(shards, lanes):
    draws = draws_of(shards, lanes, chunk=1)
    epochs = [captions(draws, range(60 * epoch, 60 * epoch + 60)) for epoch in range(2)]
    for epoch in epochs:
        assert Counter(epoch) == {f"the {number} cat": 1 for number in range(60)}
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert captions(draws_of(shards, lanes, chunk=1, seed=1), range(60)) != epochs[0]


def test_shards_that_are_shared_have_lanes_of_one_length(shards):
    draws = draws_of(shards, 7)
    counts = [sum(len(range(start, 12, step)) for _, start, step in draws._parts(lane, 0)) for lane in range(7)]
    assert sum(counts) == 60
    assert max(counts) - min(counts) <= 2, "of 5 shards, a record of each at most would be too much"
    assert {step for _, _, step in draws_of(shards, 5)._parts(3, 0)} == {1}, "with enough of them, each has one reader"


def test_more_readers_than_pairs(tmp_path):
    draws = draws_of(write_shards(tmp_path / "few", 1, 3), 16, chunk=1)
    assert Counter(captions(draws, range(48))).keys() == {f"the {number} cat" for number in range(3)}


def test_pairs_of_a_block_come_in_another_order(shards):
    draws = draws_of(shards, 1, block=12)
    found = [int(caption.split()[1]) for caption in captions(draws, range(60))]
    blocks = [found[start : start + 12] for start in range(0, 60, 12)]
    assert sorted(min(block) for block in blocks) == [0, 12, 24, 36, 48]
    assert all(sorted(block) == list(range(min(block), min(block) + 12)) for block in blocks)
    assert all(block != sorted(block) for block in blocks)


def test_a_draw_does_not_depend_on_who_reads_it(shards):
    whole = captions(draws_of(shards, 6), range(240))
    for rank in range(3):
        for worker in range(2):
            own = [n for n in range(240) if n // 4 % 3 == rank and n // 4 // 3 % 2 == worker]
            assert captions(draws_of(shards, 6), own) == [whole[number] for number in own]


@pytest.mark.parametrize("at", [1, 5, 59, 60, 133])
def test_it_goes_on_in_the_middle_of_a_shard(shards, at):
    draws = draws_of(shards, 2, chunk=3)
    whole = [draws[number] for number in range(200)]
    draws.places = dict(draw.place for draw in whole[:at])
    resumed = draws_of(shards, 5, chunk=1)
    resumed.load_state_dict(json.loads(json.dumps(draws.state_dict())))
    walked = []
    read = resumed.pairs.stream.records
    resumed.pairs.stream.records = lambda *place: ((walked.append(1), found)[1] for found in read(*place))
    assert [resumed[number] for number in range(at, 200)] == whole[at:]
    assert len(walked) <= 200 - at + 2 * 2 * 8, "a block of each lane is read again, and the next one begun"
    assert resumed[0] == whole[0], "what lies before is read from the start"


def test_nothing_to_draw(tmp_path):
    shards = write_shards(tmp_path / "empty", 2, 1)
    for path in (tmp_path / "empty").iterdir():
        path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(ValueError, match=r"no picture with a caption in its shards; .*: no caption"):
        draws_of(shards, 1)[0]
    with pytest.raises(ValueError, match="at least 1 pair to shuffle in, not 0"):
        draws_of(shards, 1, block=0)


def run(shards, output, checkpoint, **options):
    settings = {"steps": 9, "save_every": 2, "batch_size": 4, "micro_batch": 2, "stream": 5, "learning_rate": 1e-3}
    settings |= {"augment": ["crop"], "cpu": True, **options}
    return run_training(TrainSettings([shards], str(output), model=str(checkpoint), **settings))


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def kill_at(monkeypatch, step):
    train = SiglipTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return train(self, *args, **kwargs)

    monkeypatch.setattr(SiglipTrainer, "training_step", killed)


def parameters(folder):
    return dict(siglip_hf.SiglipModel.from_pretrained(folder).named_parameters())


def test_a_killed_run_ends_with_the_same_weights(tmp_path, checkpoint, monkeypatch):
    shards = write_shards(tmp_path / "shards", 3, 5)  # an epoch ends inside the run, at no end of a step
    folder = tmp_path / "shards"
    content = (folder / "s-1.tar").read_bytes()
    (folder / "s-1.tar").write_bytes(content[:7000])  # the rest is gone
    content = bytearray((folder / "s-2.tar").read_bytes())
    content[512:600] = b"\0" * 88  # its first picture
    (folder / "s-2.tar").write_bytes(content)
    whole = run(shards, tmp_path / "whole", checkpoint, workers=2)
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            run(shards, tmp_path / "killed", checkpoint, workers=2)
    # With other readers, it goes on with the lanes that it began with.
    resumed = run(shards, tmp_path / "killed", checkpoint, workers=0)
    assert resumed.resumed_from == 6
    assert largest_difference(parameters(tmp_path / "killed"), parameters(tmp_path / "whole")) == 0
    losses = [[entry["loss"] for entry in report.history if "loss" in entry] for report in (resumed, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9
    for report in (resumed, whole):
        names = {line.partition(": ")[0] for line in report.skipped}
        assert {"s-1.tar", "s-2.tar/0010"} <= names, report.skipped
        assert names <= {"s-1.tar", "s-1.tar/0008", "s-2.tar/0010"}, "0008 is cut off"
        assert any("damaged or cut off" in line for line in report.skipped)
    assert (whole.pairs, whole.batch_size) == (0, 4)


def test_from_the_command_line(shards, checkpoint, tmp_path, capsys):
    options = [
        "--model",
        str(checkpoint),
        "--cpu",
        "--batch-size",
        "4",
        "--stream",
        "8",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", shards, *options]) == 2
    assert "give steps, and eval_data in place of hold_out" in capsys.readouterr().err
    assert main(["train", shards, *options, "--steps", "2"]) == 0
    assert "a stream of pairs, 2 steps of 4" in capsys.readouterr().out
    assert main(["train", shards, *options, "--steps", "2"]) == 0
    assert "finished before" in capsys.readouterr().out
    Path(shards.replace("*", "9")).write_bytes(b"")
    assert main(["train", shards, *options, "--steps", "2"]) == 2
    assert "other settings (data " in capsys.readouterr().err
    Path(shards.replace("*", "9")).unlink()


@pytest.mark.parametrize("naflex", [False, True], ids=["siglip", "naflex"])
def test_a_dataset_that_streams(tmp_path, checkpoint, naflex):
    datasets = pytest.importorskip("datasets")

    def rows(shards):
        for shard in shards:
            for number in range(3):
                yield {"image": Image.new("RGB", (20, 20), (50 * shard, 50 * number, 0)), "caption": f"a {number} dog"}

    data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})
    cls, processor, folder = siglip_hf.SiglipModel, siglip_hf.SiglipProcessor, checkpoint
    if naflex:
        cls, processor, folder = siglip_hf.Siglip2Model, siglip_hf.Siglip2Processor, tmp_path / "naflex"
        folder.mkdir()
        write_naflex(folder)

    def trainer(name, **options):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "shuffle_buffer": 4, **options}
        args = SiglipTrainingArguments(
            str(tmp_path / name),
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        return SiglipTrainer(
            cls.from_pretrained(folder), args, data, processing_class=processor.from_pretrained(folder)
        )

    whole = trainer("run")
    whole.train()
    resumed = trainer("again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert largest_difference(weights(resumed), weights(whole)) == 0
    with pytest.raises(ValueError, match="give max_steps"):
        trainer("endless", max_steps=-1)


def member(rank, shards, output, checkpoint, rendezvous, after):
    """One of three processes of a run, which are killed when a checkpoint is there."""
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of the workers, which would import all anew
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}.items():
        os.environ[name] = str(value)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3)
    step = SiglipTrainer.training_step

    def noted(self, model, inputs, *args):
        with open(f"{output}.{rank}", "a") as file:
            pixels = inputs["pixel_values"].double().sum().item()
            file.write(f"{self.state.global_step} {json.dumps([inputs['picture_keys'].tolist(), pixels])}\n")
        if self.state.global_step == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, model, inputs, *args)

    SiglipTrainer.training_step = noted
    run(shards, output, checkpoint, batch_size=6, steps=10, workers=1)
    dist.destroy_process_group()


def in_three(shards, output, checkpoint, after=-1):
    """Runs three processes to their end; all of them, if one is killed."""
    processes = mp.get_context("forkserver")
    processes.set_forkserver_preload(["siglip_hf.training.run", "matplotlib.pyplot"])  # imported once for all of them
    rendezvous = f"{output}.rendezvous-{time.monotonic_ns()}"
    started = [
        processes.Process(
            target=member, args=(rank, shards, str(output), checkpoint, rendezvous, after if rank == 1 else -1)
        )
        for rank in range(3)
    ]
    for process in started:
        process.start()
    while any(process.is_alive() for process in started):
        if any(process.exitcode not in (None, 0) for process in started):
            for process in started:
                process.kill()
        time.sleep(0.05)
    return [process.exitcode for process in started]


@pytest.mark.slow  # make test-slow
@pytest.mark.parametrize("count", [6, 2], ids=["a shard each", "shared shards"])
def test_three_processes_that_are_killed(tmp_path, checkpoint, count):
    shards = write_shards(tmp_path / "shards", count, 60 // count)
    assert in_three(shards, tmp_path / "whole", checkpoint) == [0, 0, 0]
    assert in_three(shards, tmp_path / "killed", checkpoint, after=7)[1] == -signal.SIGKILL
    assert in_three(shards, tmp_path / "killed", checkpoint) == [0, 0, 0]
    # DDP adds up the gradients of three processes in another order in the first step after a start.
    assert largest_difference(parameters(tmp_path / "killed"), parameters(tmp_path / "whole")) < 1e-4

    def drawn(name, rank):
        found = {}
        for line in Path(f"{tmp_path / name}.{rank}").read_text().splitlines():
            step, _, batch = line.partition(" ")
            batches = found.setdefault(step, [])
            batches += [batch] if batch not in batches else []
        return found

    for rank in range(3):
        assert drawn("killed", rank) == drawn("whole", rank), "also what is drawn again has the same pairs and pixels"
    # 10 steps of 6 are one epoch of 60.
    batches = [batch for rank in range(3) for step in drawn("whole", rank).values() for batch in step]
    keys = [key for batch in batches for key in json.loads(batch)[0]]
    assert len(keys) == len(set(keys)) == 60
