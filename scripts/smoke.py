"""That an installed package works where nothing else is installed: the command, one training with the callback, one audit.

    python scripts/smoke.py

`make package` runs it in an environment that has the built wheel and what the wheel requires, and no more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

from tiny import tiny_parts
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

import trl_sae_audit
from trl_sae_audit import FeatureAttributionCallback, RunRecord, audit_preferences, write_report


def main() -> None:
    logging.disable_progress_bar()
    clone = Path(__file__).resolve().parent.parent
    if Path(trl_sae_audit.__file__).parents[1] == clone:
        sys.exit(
            "This imports the package of the clone; install the built wheel, and run it with that environment."
        )
    command = Path(sys.executable).with_name("trl-sae-audit")
    for arguments in (["--version"], ["--help"], ["audit", "--help"]):
        subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
    make_model, tokenizer, pairs, dictionary = tiny_parts(
        width=32, layers=2, features=64, hook_point="model.layers.0", pairs=16
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            make_model(),
            ref_model=make_model(),
            args=DPOConfig(
                output_dir=scratch,
                max_steps=2,
                per_device_train_batch_size=4,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
            callbacks=[FeatureAttributionCallback(dictionary, f"{scratch}/record")],
        )
        trainer.train()
        assert RunRecord.load(f"{scratch}/record").last_step == 2
        write_report(f"{scratch}/record", f"{scratch}/report.html")
        audit = audit_preferences(make_model(), tokenizer, pairs, dictionary, lookahead=None, progress=False)
        assert len(audit.features()) == dictionary.d_sae
    megabytes = sum(file.size or 0 for file in files("trl-sae-audit") or ()) / 1e6
    print(
        f"trl-sae-audit {trl_sae_audit.__version__} works: {megabytes:.1f} MB installed, without what it requires"
    )


if __name__ == "__main__":
    main()
