"""Other trainers' names for our settings lead to ours."""

import pytest

from gpt2_flax.config.other_names import NOT_NEEDED, THEIR_NAMES
from gpt2_flax.config.train_config import FIELDS, load_config
from gpt2_flax.errors import UserError
from scripts import generate


def remedy(argv, load=load_config) -> str:
    with pytest.raises(UserError) as error:
        load(argv)
    lines = str(error.value).split("\n")
    assert lines[0] == f"unknown flag {argv[0]}"
    return lines[1].strip()


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--n_layer", "--n_layers"),  # nanoGPT
        ("--max_iters", "--max_steps"),
        ("--eval_interval", "--eval_every"),
        ("--out_dir", "--output_dir"),
        ("--min_lr", "--min_learning_rate"),
        ("--wandb_log", "--report_to wandb"),
        ("--lr", "--learning_rate"),
        ("--model_name_or_path", "--init_from"),  # transformers
        ("--per_device_train_batch_size", "--batch_size"),
        ("--num_train_epochs", "--epochs"),
        ("--gradient-accumulation-steps", "--grad_accum"),
        ("--warmup_ratio", "--warmup_steps"),
        ("--resume_from_checkpoint", "--resume"),
        ("--save_total_limit", "--keep"),
        ("--bf16", "--dtype bfloat16"),
        ("--fp16", "--dtype bfloat16"),
        ("--fsdp", "--parallel fsdp"),
        ("--n_hedas", "--n_heads"),  # misspelt
        ("--outputdir", "--output_dir"),
    ],
)
def test_a_known_trainers_flag_leads_to_ours(flag, ours):
    assert remedy([flag, "1"]) == f"did you mean {ours}?"


@pytest.mark.parametrize("flag", ["--compile", "--device", "--do_train", "--push_to_hub"])
def test_a_flag_that_needs_no_setting_says_why(flag):
    assert remedy([flag]) in NOT_NEEDED.values()


@pytest.mark.parametrize("flag", ["--xyz", "--lora_rank", "--beam_me_up"])
def test_no_name_is_offered_where_none_is_near(flag):
    assert remedy([flag]) == "python scripts/train.py --help lists them"


def test_a_file_of_settings_gets_the_same_help(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("fp16: true\nlr: 1e-3\n")
    with pytest.raises(UserError) as error:
        load_config(["--config", str(path)])
    assert "fp16: unknown setting\n  did you mean dtype: bfloat16?" in str(error.value)
    assert "lr: unknown setting\n  did you mean learning_rate?" in str(error.value)


def test_other_commands_offer_only_their_own_flags():
    load = lambda argv: generate.main(["--model", "x", "--prompt", "y", *argv])  # noqa: E731
    assert remedy(["--start"], load) == "did you mean --prompt?"
    assert remedy(["--out_dir"], load) == "did you mean --model?"
    assert "--help lists them" in remedy(["--lr"], load)


def test_no_name_of_ours_is_taken_for_another_trainers():
    words = [word for names in (*THEIR_NAMES.values(), *NOT_NEEDED) for word in names.split()]
    assert set(words) & set(FIELDS) <= {"output_dir", "train_file", "validation_file"}
    assert {ours.split()[0] for ours in THEIR_NAMES} > {"n_layers", "prompt"}
