"""On CUDA devices: nothing waits for them between two logs, and every engine records what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.processes import TESTS, assert_same_record, start
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary, make_model, make_tokenizer

from trl_sae_audit import FeatureDictionary
from trl_sae_audit.attribution.feature_tracker import FeatureTracker
from trl_sae_audit.attribution.microbatch import Batch
from trl_sae_audit.models.hook_points import resolve_hook_point

pytestmark = pytest.mark.gpu


def test_no_synchronisation_between_logs() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).cuda()
    dictionary = make_dictionary().to("cuda")
    tracker = FeatureTracker(
        dictionary,
        resolve_hook_point(model, HOOK_POINT),
        {"one": 1},
        top_k=D_SAE,
        health_tokens=8,
        sided=True,
        paired=True,
    )
    sides = torch.tensor([1.0, 1.0, -1.0, -1.0], device="cuda")
    for _ in range(3):
        for _ in range(2):
            batch = torch.randint(4, len(tokenizer), (4, 12), device="cuda")
            torch.cuda.set_sync_debug_mode("error")
            try:
                tracker.begin_microbatch()
                torch.cuda.set_sync_debug_mode("default")  # the model's own forward may wait
                loss = model(input_ids=batch).logits.float().logsumexp(-1).mean()
                torch.cuda.set_sync_debug_mode("error")
                loss.backward()
                tracker.end_microbatch([Batch(4, sides=lambda: sides)])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert tracker.end_step(2.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    tracker.remove()
    assert len(tracker.pack().steps) == 3


@pytest.mark.newest
@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "engine",
    ["gpus", "fsdp2", *(pytest.param(name, marks=pytest.mark.deepspeed) for name in ("zero2", "zero3"))],
)
def test_engines_record_what_one_process_does(tmp_path: Path, engine: str) -> None:
    worker, launch = str(TESTS / "helpers" / "process_worker.py"), ("-m", "accelerate.commands.launch")
    configuration = TESTS.parent / "configs" / "accelerate" / f"{engine}.yaml"
    start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=1",
        worker,
        str(tmp_path / "one"),
        "dpo",
    )
    start(*launch, "--config_file", str(configuration), worker, str(tmp_path / "two"), "dpo")
    assert_same_record(tmp_path / "two" / "dpo", tmp_path / "one" / "dpo", tolerance=1e-4)


def test_an_offloaded_dictionary_gives_the_same_and_stays_where_it_is() -> None:
    dictionary = make_dictionary()
    offloaded = FeatureDictionary(dictionary.decoder, HOOK_POINT, "offloaded", offload=True).to("cuda")
    assert offloaded.decoder.device.type == "cpu"
    vectors = torch.randn(7, dictionary.d_model)
    torch.testing.assert_close(offloaded.project(vectors), dictionary.to("cuda").project(vectors))
    torch.testing.assert_close(offloaded.project(vectors).cpu(), dictionary.project(vectors))
