"""A process that has no file of its own in a checkpoint takes nothing of another one's samples and random numbers."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from shared.trainers.online_state import FILE, load_state


def a_process(rank):
    random = torch.Generator().manual_seed(100 + rank)
    options = {"num_generations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 2}
    trainer = SimpleNamespace(
        args=SimpleNamespace(process_index=rank, world_size=2, device="cpu", should_log=rank == 0, **options),
        accelerator=SimpleNamespace(
            reduce=lambda lacking, how: 1 - torch.zeros_like(lacking)
        ),  # one process lacks its own
        prompts=SimpleNamespace(cursor=0, rows=range(10)),
        alarms=SimpleNamespace(load_state=lambda state: None),
        load_controllers=lambda state: None,
        random=random,
        buffer=None,
        _noted=defaultdict(list),
    )
    state = {
        "processes": 2,
        "shape": options,
        "prompts": 4,
        "random": torch.Generator().manual_seed(5).get_state(),
        "controllers": {},
        "alarms": {},
        "noted": {"reward": [1.0]},
        "sums": {},
        "buffer": {"rows": [0]},
    }
    return trainer, state


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_file_is_missing_all_processes_sample_anew(rank, tmp_path, capsys):
    trainer, state = a_process(rank)
    before = trainer.random.get_state()
    torch.save(state, tmp_path / FILE.format(rank=0))
    load_state(trainer, tmp_path)
    assert trainer.prompts.cursor == 4 and trainer.last_epoch == 0.4
    assert trainer.buffer is None and not trainer._noted
    assert torch.equal(trainer.random.get_state(), before)
    assert ("A process has no file of its own" in capsys.readouterr().out) is (rank == 0)
