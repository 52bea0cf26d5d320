"""scripts/sft_vlm.py as a user runs it: what works, and one clear line for each way it cannot."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sft_vlm.py"
QUICK = [
    "--max_steps=1",
    "--per_device_train_batch_size=2",
    "--eval_answers=0",
    "--disable_tqdm",
    "--output_dir",
    "out",
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the script in an empty folder: its status (0 where it ends well), and what it says."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sft_vlm.py", *map(str, words)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code or 0
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def conversation(*parts, answer="red"):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


TEXT, IMAGE = {"type": "text", "text": "Which colour?"}, {"type": "image"}


def row(**changed):
    return {"image": "a.png", "messages": conversation(IMAGE, TEXT), **changed}


def write(folder, rows, name="rows.jsonl"):
    Image.new("RGB", (48, 40), (200, 0, 0)).save(folder / "a.png")
    (folder / name).write_text("\n".join(json.dumps(each) for each in rows))
    return name


GOOD = [row() for _ in range(3)]
BAD_ROWS = {
    "wrong type": (row(messages=5), "row 2: messages is int"),
    "more places than images": (row(messages=conversation(IMAGE, IMAGE, TEXT)), "row 2: 1 image but 2 image places"),
    "no assistant turn": (row(messages=conversation(IMAGE, TEXT)[:1]), "row 2: messages has no assistant turn"),
    "missing image file": (row(image="b.png"), "row 2: image .*b.png"),
    "truncated image file": (row(image="cut.png"), "row 2: image .*cut.png.* truncated"),
}


def assert_refused(result, *patterns, folder):
    import re

    status, said = result
    assert status == 2 and "Traceback" not in said
    assert said.splitlines() and any(line.startswith("error: ") for line in said.splitlines())
    for pattern in patterns:
        assert re.search(pattern, said, re.DOTALL), said
    assert not list((folder / "out").rglob("*"))


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_before_the_model_is_loaded(case, run, tmp_path, monkeypatch):
    bad, message = BAD_ROWS[case]
    name = write(tmp_path, [*GOOD[:2], bad, *GOOD])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    import visionalign.preparing

    monkeypatch.setattr(visionalign.preparing, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert_refused(run("--dataset_name", name, *QUICK), message, "on_bad_row", folder=tmp_path)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_can_be_left_out_and_are_listed(case, run, tmp_path):
    bad, message = BAD_ROWS[case]
    name = write(tmp_path, [*GOOD[:2], bad, *GOOD])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    status, said = run("--dataset_name", name, "--on_bad_row", "skip", *QUICK)
    assert status == 0 and "5 of 6 rows" in said and "1 left out" in said and message.split(":")[0] in said
    notes = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["notes"]
    assert any("row 2: left out" in note for note in notes)


def test_a_bad_row_found_in_mid_training_costs_no_step(run, tmp_path):
    name = write(tmp_path, [*[row() for _ in range(15)], row(image="cut.png")])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for workers in ("0", "2"):
        status, said = run(
            "--dataset_name", name, "--check_rows", "0", "--dataloader_num_workers", workers, "--max_steps", "30",
                "--per_device_train_batch_size=1", "--eval_answers=0", "--output_dir", f"out{workers}", "--seed", "2",
        )  # fmt: skip
        assert status == 2 and "error: row 15: image" in said and "Traceback" not in said
        saved = list((tmp_path / f"out{workers}").glob("checkpoint-*/complete.json"))
        assert saved and "Saved at step" in said


def test_data_that_cannot_be_used_at_all(run, tmp_path):
    refused = lambda rows, *patterns, extra=(): assert_refused(  # noqa: E731
        run("--dataset_name", write(tmp_path, rows), *extra, *QUICK), *patterns, folder=tmp_path
    )
    refused([{"image": "a.png", "question": "x"}], "columns `image`, `question`", "Allowed: .*`messages`")
    refused([], "no rows")
    refused(GOOD, "no token to learn within max_length 12", extra=("--max_length", "12"))
    result = run("--dataset_name", "nowhere/at-all", *QUICK)
    assert_refused(result, "nowhere/at-all", "not a local path", folder=tmp_path)


def test_a_cut_through_an_image_is_refused(run, tmp_path, tiny):
    name = write(tmp_path, [row(messages=conversation(TEXT, IMAGE))])
    model = ("--model_name_or_path", tiny("llava"))
    result = run("--dataset_name", name, *model, "--max_length", "12", *QUICK)
    assert_refused(result, "row 0: has .* image ends at token .*max_length is 12", folder=tmp_path)


def test_models_that_cannot_be_used(run, tmp_path, tiny):
    name = write(tmp_path, GOOD)
    refused = lambda model, *patterns: assert_refused(  # noqa: E731
        run("--dataset_name", name, "--model_name_or_path", model, *QUICK), *patterns, folder=tmp_path
    )
    refused(tiny("lm"), "text-only", "vision-language model")
    refused("nobody/nothing", "nobody/nothing", "network")
    refused("./nothing", "no such folder")
    refused("builtin/vlm-smal", "no built-in model", "Did you mean 'builtin/vlm-small'")
    without = tmp_path / "without_template"
    import shutil

    shutil.copytree(tiny("qwen2_vl"), without)
    (without / "chat_template.jinja").unlink()
    refused(without, "no chat template", "chat_template")


@pytest.mark.parametrize(
    ("words", "patterns"),
    [
        (["--learning_rat", "1"], ["--learning_rat: unknown option", "Did you mean --learning_rate"]),
        (["--lr_scheduler_type", "cosin"], ["not one of linear, cosine", "Did you mean cosine"]),
        (["--max_steps", "many"], ["--max_steps many: not a whole number"]),
        (["--eval_answers", "-1"], ["eval_answers -1: must be at least 0"]),
        (["--load_in_4bit"], ["cannot be trained", "use_peft"]),
        (["--fp16"], ["needs a GPU"]),
        (["--resume_from_checkpoint", "true"], ["no complete checkpoint"]),
        (["--use_peft", "--lora_target_modules", "nonsense"], ["nonsense"]),
        (["--learning_rate", "-1"], ["learning_rate -1.0: must be at least 0"]),
        (["--max_pixels", "0"], ["max_pixels 0: must be at least 1"]),
        (["--label_smoothing_factor", "0.1"], ["label_smoothing_factor 0.1 is not supported"]),
        (["--remove_unused_columns"], ["remove_unused_columns True is not supported"]),
        (
            ["--train_sampling_strategy", "group_by_length"],
            ["train_sampling_strategy group_by_length is not supported"],
        ),
        (["--eval_strategy", "epoch"], ["eval_strategy is epoch, but there are no held-out rows"]),
        (["--optim", "galore_adamw", "--optim_target_modules", "q_proj"], ["--optim galore_adamw"]),
        (["--push_to_hub"], ["nobody is logged in"]),
        (["--dataloader_drop_last", "--per_device_train_batch_size", "9"], ["3 rows do not fill a batch of 9"]),
        (["--report_to", "wandbb"], ["--report_to wandbb: not one of none, all"]),
        (["--report_to", "comet_ml"], ["not installed", "pip install comet_ml"]),
        (["--attn_implementation", "flash_attention_9"], ["flash_attention_9"]),
    ],
)
def test_options_that_cannot_be_used(words, patterns, run, tmp_path, tiny):
    name = write(tmp_path, GOOD)
    model = ["--model_name_or_path", str(tiny("llava"))]
    status, said = run("--dataset_name", name, *model, *words, "--output_dir", "out")
    assert_refused((status, said), *patterns, folder=tmp_path)


def test_a_yaml_file_is_read_as_strictly(run, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-5\nmax_step: 3\n")
    assert_refused(run("--config", "run.yaml", *QUICK), "run.yaml, line 2: max_step", "max_steps", folder=tmp_path)


def test_an_output_folder_of_another_run_is_refused_and_kept(run, tmp_path):
    name = write(tmp_path, GOOD)
    assert run("--dataset_name", name, *QUICK)[0] == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    status, said = run("--dataset_name", name, *QUICK)
    assert status == 2 and "holds another run" in said
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert run("--dataset_name", name, "--overwrite_output_dir", *QUICK)[0] == 0


def test_the_saved_options_make_the_same_run(run, tmp_path):
    from safetensors.torch import load_file

    name = write(tmp_path, GOOD)
    assert run("--dataset_name", name, "--learning_rate", "3e-4", *QUICK)[0] == 0
    assert run("--config", "out/run.yaml", "--output_dir", "again")[0] == 0
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "again"))
    assert all((first[key] == second[key]).all() for key in first)


def test_files_folders_and_mixtures_are_read(run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (48, 40), (0, 0, 200)).save(folder / "b.png")
    (folder / "metadata.csv").write_text("file_name,prompt,completion\nb.png,Which colour?,blue\n" * 1)
    write(tmp_path, GOOD)
    (tmp_path / "rows.csv").write_text("image,prompt,completion\na.png,Which colour?,red\na.png,What?,red\n")
    for names in (["pictures"], ["rows.csv"], ["pictures", "rows.csv"], ["builtin/digits"]):
        status, said = run("--dataset_name", *names, "--overwrite_output_dir", "--max_train_rows", "4", *QUICK)
        assert status == 0, said
    status, said = run("--dataset_name", "rows.jsonl", "--streaming", "--overwrite_output_dir", *QUICK)
    assert status == 0, said


def test_an_adapter_is_trained_saved_and_continued(run, tmp_path, tiny):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    name, model = write(tmp_path, GOOD), str(tiny("llava"))
    common = ("--dataset_name", name, "--model_name_or_path", model)
    status, said = run(*common, "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", *QUICK)
    assert status == 0 and "parameters are trained" in said, said
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), tmp_path / "out")
    status, said = run(*common, "--adapter_name_or_path", "out", *QUICK[:-1], "more")
    assert status == 0 and (tmp_path / "more" / "adapter_model.safetensors").is_file(), said


def test_a_stream_is_evaluated_and_answered(run, tmp_path):
    words = ["--dataset_name", "builtin/digits", "--streaming", "--max_eval_rows", "6", "--eval_strategy", "steps"]
    status, said = run(
        *words, "--eval_steps=1", *QUICK[:2], "--eval_answers=4", "--output_dir", "out", "--max_new_tokens=3"
    )
    assert status == 0 and "accuracy/digit" in said, said
    curves = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["curves"]
    assert "eval_loss" in curves


def test_a_run_goes_on_with_its_own_options(run, tmp_path):
    from safetensors.torch import load_file

    name = write(tmp_path, GOOD)
    common = ["--dataset_name", name, "--learning_rate", "3e-4", "--per_device_train_batch_size", "1"]
    common += ["--eval_answers", "0", "--disable_tqdm", "--save_steps", "2", "--max_steps", "4"]
    assert run(*common, "--output_dir", "whole")[0] == 0
    assert run(*common, "--output_dir", "cut")[0] == 0
    import shutil

    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    status, said = run("--output_dir", "cut", "--resume_from_checkpoint")
    assert status == 0 and "Going on from cut/checkpoint-2 (step 2)" in said, said
    whole, cut = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut"))
    assert all((whole[key] == cut[key]).all() for key in whole)
    status, said = run("--output_dir", "cut", "--resume_from_checkpoint")
    assert status == 2 and "the run is at step 4 of 4" in said
    status, said = run("--output_dir", "cut", "--resume_from_checkpoint", "--max_steps", "5")
    assert status == 0 and "max_steps was 4, is 5" in said
    status, said = run("--output_dir", "cut", "--resume_from_checkpoint", "--max_steps", "6", "--use_peft")
    assert status == 2 and "Traceback" not in said, said


def test_an_adapter_is_no_model(run, tmp_path, tiny):
    name, model = write(tmp_path, GOOD), str(tiny("llava"))
    assert run("--dataset_name", name, "--model_name_or_path", model, "--use_peft", *QUICK)[0] == 0
    status, said = run("--dataset_name", name, "--model_name_or_path", "out", *QUICK[:-1], "other")
    assert status == 2 and "is an adapter" in said and "adapter_name_or_path" in said


def test_access_tokens_are_not_written_down(run, tmp_path, tiny):
    name, model = write(tmp_path, GOOD), str(tiny("llava"))
    secret = json.dumps({"token": "hf_SECRET"})
    status, said = run("--dataset_name", name, "--model_name_or_path", model, "--model_init_kwargs", secret, *QUICK)
    assert status == 0, said
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hf_SECRET" not in path.read_bytes(), path
