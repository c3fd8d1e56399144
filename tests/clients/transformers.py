"""Hugging Face's Trainer."""

import pytest

from tests.clients.records import STEPS, VAL, page, planned, run


def program(root, ranks: int, **options) -> str:
    code = page("Hugging Face's Trainer", root, ranks)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True} | options
    code = code.replace("save_steps=500", ", ".join(f"{name}={value!r}" for name, value in options.items()))
    head = "    def forward(self, pixel_values, labels, ids, valid):\n"
    assert head in code
    code = code.replace(head, head + '        record("train" if self.training else "val", labels[valid])\n')
    return code.replace("functional.cross_entropy", "cross_entropy")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_pages_program_sees_each_record_once(root, seen, tmp_path, ranks):
    printed = run(program(root, ranks), tmp_path, ranks)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation()
    assert f"'eval_images': {VAL}" in printed or f"'eval_images': '{VAL}'" in printed


@pytest.mark.parametrize("steps", [STEPS, STEPS + 1])
def test_resume_sees_what_was_left(root, seen, tmp_path, steps):
    run(program(root, 1, save_steps=steps, max_steps=steps), tmp_path)
    before = seen.batches("train")
    seen.skip()
    code = program(root, 1).replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)")
    run(code, tmp_path)
    assert len(before) == steps and before + seen.batches("train") == planned(root, 2)


def test_evaluation_in_each_epoch_leaves_training_alone(root, seen, tmp_path):
    run(program(root, 1, eval_strategy="epoch"), tmp_path)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(3)
