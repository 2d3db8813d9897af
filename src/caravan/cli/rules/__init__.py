"""Rules for what no single value of a config shows: combinations, ranges, folders.

A rule is a function from the composed config to mistakes; to add one, write it beside its likes and
list it in RULES. It asks with `asking.value`, which is None for whatever is missing or broken: that
is told already.
"""

from __future__ import annotations

from caravan.cli.rules import searching, training, values
from caravan.cli.rules.asking import Rule

RULES: list[Rule] = [
    values.encoding_holds,
    values.numbers_are_in_range,
    values.needed_keys_are_there,
    values.heads_divide_the_width,
    values.optimizer_can_step,
    values.temperatures_are_positive,
    values.trainer_can_count,
    values.precision_is_known,
    values.attention_is_known,
    values.measures_are_known,
    training.search_is_deep_enough,
    training.monitored_is_logged,
    training.best_checkpoints_have_names,
    training.run_has_a_name,
    training.loggers_are_installed,
    training.training_ends,
    training.trainer_leaves_the_rest_to_the_run,
    training.stage_suits_the_encoding,
    training.both_ways_suits,
    training.adaptation_wants_a_decoder,
    training.teacher_is_there,
    training.loss_suits_the_scores,
    training.parts_work_together,
    searching.retrievers_are_names,
    searching.questions_are_searched_for,
    values.reranking_is_possible,
    searching.folders_exist,
    searching.collections_are_there,
    searching.models_suit_their_stage,
    searching.own_code_is_allowed,
    searching.runs_can_be_fused,
]
