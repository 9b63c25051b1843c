"""UnifiedReward 1.5 (arXiv 2503.05236): a vision-language model that scores alignment and quality together, 1 to 5.

Question, size, temperature, expression and scale are those of Flow-GRPO's released code (yifan123/flow_grpo,
flow_grpo/rewards.py, `unifiedreward_score_sglang`), by which Flow-GRPO, DiffusionNFT and DiffusionOPD report the
metric. The model's own example (CodeGoat24/UnifiedReward, point_score_image_generation.py) asks for the caption's
elements as well, so its numbers are others.
"""

from __future__ import annotations

from opd_fast.rewards.judge import Judge


class UnifiedReward(Judge):
    """The model's score of an image divided by 5, so 0.2 to 1; 0 for a reply without a score, as published.

    The tables of papers show five times the value.
    """

    question = (
        "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate "
        "this image based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with "
        "the provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as "
        "described in the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including "
        "clarity, detail preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, "
        "assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
    )
    pattern = r"Final Score:\s*([1-5](?:\.\d+)?)"
    scale = 5.0
    unread = 0.0
    size = (512, 512)
    start = (
        "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --port 17140 "
        "--chat-template chatml-llava"
    )
