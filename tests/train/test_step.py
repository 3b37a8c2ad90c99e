"""The step's data: rows made ahead by another process."""

import torch

from hfsft.doctor.stage_checks import train_tiny, write_recipe


def test_rows_made_ahead_by_a_process_change_no_bit_of_a_run_or_its_resume(tmp_path):
    write_recipe(tmp_path)
    ahead = ("--dataloader_num_workers", "1")
    whole = train_tiny(tmp_path, "whole")
    assert torch.equal(train_tiny(tmp_path, "ahead", *ahead), whole)
    train_tiny(tmp_path, "resumed", "--max_steps", "2", *ahead)
    assert torch.equal(train_tiny(tmp_path, "resumed", *ahead), whole)
