"""The `plan` section: what `jpo plan` can neither count nor measure on this machine. No stage reads it."""

from jpo_ray.config_base import Count, Positive, Section, Share


class PlanConfig(Section):
    # What the data hold, where they are not on this machine; those that are there are counted.
    train_instructions: Count | None = None
    validation_instructions: Count | None = None
    test_instructions: Count | None = None
    sft_items: Count | None = None  # of items.sft
    responses_per_instruction: Count = 2  # of train and validation
    conditional_labels: Count | None = None  # decisive ones that come with the training data
    joint_labels: Count | None = None
    short_items: Share = 1.0  # share of the items that pairs.max_item_characters leaves
    # Tokens of an item in the mean: template and instruction; response. Of items.sft both together.
    instruction_tokens: Positive | None = None
    response_tokens: Positive | None = None
    sft_tokens: Positive | None = None
    decisive: Share = 0.65  # share of the judged comparisons that are no ties (61 to 73 % in the paper)
    # The machine.
    device_memory_gib: Positive | None = None  # of a GPU; default: of the GPUs here, else 80
    peak_tflops: Positive | None = None  # of a GPU; without GPUs of all cores; default: 989, or 0.1 a core
    mfu: Share | None = None  # share of the peak that training and scoring reach; default: 0.35, without GPUs 0.5
    sample_mfu: Share = 0.05  # that sampling reaches
