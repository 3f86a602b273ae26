"""Audits, and trainings of one step that they must agree with."""

from __future__ import annotations

from trl import DPOConfig

from trl_sae_audit.audit.api import audit_preferences


def config(tmp_path, **overrides):
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "bf16": False}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return DPOConfig(str(tmp_path / "out"), **(settings | overrides))


def by_feature(audit):
    return audit.features().set_index("feature").sort_index()


def audited(model, tokenizer, data, dictionary, **options):
    """The plain pass, without a lookahead."""
    options = {"lookahead": None, "progress": False} | options
    return audit_preferences(model, tokenizer, data, dictionary, **options)
