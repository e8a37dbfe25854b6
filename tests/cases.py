"""The table of cases: models, adapters, resume, images and processors as people have them, and their tests.

Each case stands for its kind. `make cases` runs all of them; `python -m tests.cases A1 D4` runs some.
"""

from __future__ import annotations

import sys

from tests import tables
from tests.tables import Row as Case

TABLE: dict[str, Case] = {
    # ---- models and adapters ----
    "A1": Case(
        "an adapter beside the weights of a model folder",
        "exit 3 with both ways out, both sides; a run that trains nothing is refused",
        (
            "test_config_model_folder.py::test_a_broken_file_of_a_model_folder_is_named_with_what_it_is",
            "test_cli.py::test_a_world_that_does_not_fit_is_exit_code_2_or_3_and_nothing_is_written",
            "test_models_tuning.py::test_a_student_without_a_trained_parameter_is_refused",
            "test_trainer.py::test_a_student_that_cannot_be_trained_as_asked_is_refused_at_construction",
        ),
    ),
    "A2": Case(
        "LoRA names that match nothing",
        "exit 3 for each name, with the nearest one",
        (
            "test_models_tuning.py::test_a_name_that_matches_nothing_is_an_error_with_the_nearest_one",
            "test_models_tuning.py::test_names_that_match_are_let_through_as_they_are",
            "test_models_tuning.py::test_an_exclusion_that_matches_nothing_is_told_and_changes_nothing",
        ),
    ),
    "A3": Case(
        "bfloat16 weights, trained in full",
        "a warning with the measured share of updates that round away",
        (
            "test_trainer_watch.py::test_updates_that_bfloat16_weights_cannot_take_are_told_with_their_share",
            "test_trainer_watch.py::test_two_ranks_are_told_once_of_updates_that_round_away",
        ),
    ),
    "A4": Case(
        "the best step by a metric whose name misleads",
        "the direction of our own table; what has none is refused",
        (
            "test_trainer_startup_checks.py::test_the_best_step_is_the_one_with_the_best_value",
            "test_trainer_startup_checks.py::test_every_term_and_metric_has_a_direction_or_is_known_to_have_none",
            "test_trainer_startup_checks.py::test_a_metric_without_a_direction_or_that_evaluations_lack_is_refused",
            "test_trainer_startup_checks.py::test_early_stopping_and_schedulers_follow_the_direction_of_the_metric",
            "test_vision_edges.py::test_the_best_step_of_a_visual_term_is_its_smallest_and_needs_images",
            "test_early_stopping.py::test_more_of_an_accuracy_is_better",
        ),
    ),
    "A5": Case(
        "a model that sees the future",
        "exit 3, both sides, full and LoRA; other kinds by their config",
        (
            "test_models_probe.py::test_a_model_that_sees_later_tokens_is_found",
            "test_models_probe.py::test_a_causal_model_is_not_suspected",
            "test_models_probe.py::test_a_vision_language_model_is_not_suspected",
            "test_models_probe.py::test_a_student_or_teacher_that_sees_the_future_ends_a_run_before_it_begins",
            "test_models_probe.py::test_adapters_do_not_hide_a_model_that_sees_the_future",
            "test_models_probe.py::test_other_kinds_of_models_are_refused_by_their_config_before_weights_are_looked_for",
            "test_models_probe.py::test_a_tie_between_experts_in_one_text_is_no_sign",
        ),
    ),
    "A6": Case(
        "RoPE that looks at the batch (longrope, dynamic)",
        "one warning where lengths are mixed",
        (
            "test_models_probe.py::test_the_numbers_of_a_short_row_depend_on_the_row_beside_it",
            "test_models_probe.py::test_a_batch_that_mixes_lengths_is_told_for_longrope",
            "test_models_probe.py::test_any_row_beyond_the_original_length_is_told_for_dynamic_rope",
            "test_models_probe.py::test_layers_with_a_rope_of_their_own_are_read_as_well",
        ),
    ),
    "A7": Case(
        "padding that is not honoured (RWKV, MiniMax)",
        "answers are written row by row, or refused",
        (
            "test_models_probe.py::test_a_model_whose_predictions_depend_on_the_padding_behind_them_is_found",
            "test_models_probe.py::test_prompts_that_a_model_cannot_answer_together_are_answered_as_if_alone",
            "test_models_probe.py::test_a_model_that_honours_left_padding_answers_all_prompts_together",
            "test_models_probe.py::test_padding_that_is_read_is_found_even_where_its_embedding_is_still_zero",
            "test_models_probe.py::test_prompts_that_cannot_be_generated_apart_are_refused",
            "test_models_probe.py::test_a_run_on_answers_of_a_model_that_does_not_honour_padding_says_so_before_training",
        ),
    ),
    "A8": Case(
        "rows longer than the positions",
        "exit 3 for learned positions, a warning for RoPE, both models",
        (
            "test_models_probe.py::test_the_number_of_learned_positions_is_that_of_the_longest_row_that_runs",
            "test_models_probe.py::test_rows_longer_than_the_positions_are_refused_before_the_first_step",
            "test_models_probe.py::test_rows_beyond_what_a_model_was_made_for_are_told_where_it_takes_them",
            "test_models_probe.py::test_evaluation_rows_generated_answers_and_padding_count_as_well",
            "test_models_probe.py::test_answers_that_a_teacher_has_no_positions_for_are_refused_before_it_writes",
            "test_models_probe.py::test_rows_whose_lengths_nobody_knew_are_refused_before_the_forward_that_would_fail",
            "test_models_probe.py::test_virtual_tokens_take_positions_from_the_rows",
        ),
    ),
    "A9": Case(
        "a mixture class without experts",
        "no router logits, no such term",
        ("test_models_experts.py::test_a_mixture_class_without_experts_has_no_load_balancing_loss",),
    ),
    "A10": Case(
        "loading errors: attention, quantised folders, FP8",
        "exit 3 with folder and package; from config.json where it can",
        (
            "test_cli.py::test_a_world_that_does_not_fit_is_exit_code_2_or_3_and_nothing_is_written",
            "test_config_model_folder.py::test_a_quantised_folder_without_its_package_names_the_package",
            "test_config_folders.py::test_validate_looks_into_the_models_folders",
            "test_models_loading.py::test_a_model_that_cannot_be_loaded_is_named_with_the_reason",
            "test_models_loading.py::test_an_unknown_way_of_quantising_is_refused_not_ignored",
            "test_models_loading.py::test_fp8_weights_on_a_cpu_are_expanded_where_bfloat16_is_asked_and_refused_elsewhere",
            "test_models_tuning.py::test_attention_without_a_backward_pass_is_refused",
        ),
    ),
    "A11": Case(
        "gradient checkpointing where a class has none",
        "off, with a line",
        ("test_models_tuning.py::test_checkpointing_is_off_where_a_class_has_none",),
    ),
    "A12": Case(
        "all-linear on Mamba and its kin",
        "what peft refuses is left out, and said",
        (
            "test_models_tuning.py::test_all_linear_leaves_out_what_peft_refuses_and_says_so",
            "test_models_tuning.py::test_all_linear_leaves_out_weights_that_modules_share_so_that_a_merge_changes_nothing",
        ),
    ),
    "A13": Case(
        "weights that the last step broke",
        "exit 5, nothing is saved; one and two ranks",
        (
            "test_cli.py::test_weights_that_the_last_step_broke_end_with_exit_code_5_and_are_not_saved",
            "test_trainer_watch.py::test_weights_that_are_not_finite_are_never_saved",
            "test_trainer_watch.py::test_a_checkpoint_is_not_written_where_one_ranks_weights_are_not_finite",
        ),
    ),
    # ---- resume ----
    "B1": Case(
        "resume with another batch, accumulation, ranks",
        "goes on at the next row, ends after the same rows",
        (
            "test_trainer_rows.py::test_any_run_that_is_stopped_anywhere_goes_on_with_any_other_options_at_the_next_row",
            "test_trainer_rows.py::test_options_may_change_at_every_resume",
            "test_trainer_rows.py::test_a_part_of_an_epoch_ends_after_the_row_where_the_first_run_would_have",
            "test_trainer_rows.py::test_rows_that_fill_no_batch_are_left_out_and_none_is_trained_twice",
            "test_cli.py::test_a_run_that_is_half_done_goes_on_with_a_larger_batch_after_the_same_rows",
        ),
    ),
    "B2": Case(
        "a checkpoint whose numbers are not finite",
        "never taken; the newest that is finite stays",
        (
            "test_runs_checkpoints.py::test_a_checkpoint_whose_optimizer_state_is_not_finite_is_not_taken",
            "test_runs_checkpoints.py::test_the_newest_that_is_finite_stays_whatever_comes_after",
            "test_nonfinite.py::test_the_checkpoint_before_is_intact_named_and_gone_on_from",
        ),
    ),
    "B3": Case(
        "save_only_model and --resume auto",
        "refused, the finished model stays; validate warns",
        (
            "test_runs_checkpoints.py::test_a_model_alone_is_no_state_to_go_on_from_and_the_finished_model_stays",
            "test_config_rules.py::test_an_option_without_effect_gets_one_warning",
        ),
    ),
    "B4": Case(
        "max_steps raised at a resume",
        "the learning rates of the longer run",
        (
            "test_trainer_rows.py::test_max_steps_stays_a_number_of_steps",
            "test_runs_changed.py::test_what_is_allowed_of_the_optimizer_is_what_the_longer_run_goes_on_with",
        ),
    ),
    # ---- folders and messages ----
    "C1": Case(
        "an adapter folder as a model; .bin, GGUF, consolidated",
        "loaded on its base; the way out for each of the others",
        (
            "test_adapters_as_models.py::test_a_run_folder_with_an_adapter_is_gone_on_with_taught_by_and_trained_in_full",
            "test_adapters_as_models.py::test_an_adapter_without_its_base_is_found_without_torch",
            "test_python_class.py::test_a_teacher_by_the_name_of_an_adapters_folder_is_loaded_on_its_base",
            "test_python_class.py::test_a_student_by_the_name_of_an_adapters_folder_goes_on_training_it",
            "test_mistakes.py::test_a_mistake_is_found_with_its_place_and_what_to_do_before_torch_is_needed",
        ),
    ),
    "C2": Case(
        "what transformers 5 writes, for transformers 4",
        "export writes it in the words of 4, with the same numbers",
        (
            "test_runs_export.py::test_what_is_written_for_transformers_4_has_its_words_and_the_same_numbers",
            "test_runs_export.py::test_words_of_transformers_4_for_scaled_local_and_partial_positions_tokens_and_processors",
            "test_runs_export.py::test_what_was_not_tried_with_transformers_4_is_refused",
        ),
    ),
    "C3": Case(
        "a bfloat16 student saved as float32",
        "export --dtype halves it",
        ("test_runs_export.py::test_a_student_that_was_trained_in_full_is_exported_as_it_is_or_in_half",),
    ),
    "C4": Case(
        "a teacher with another chat template",
        "a finding",
        ("test_preflight_doctor.py::test_a_planted_fault_is_found_before_the_first_step",),
    ),
    "C5": Case(
        "line breaks in what libraries say",
        "are no literal \\n on the terminal",
        (
            "test_cli.py::test_a_world_that_does_not_fit_is_exit_code_2_or_3_and_nothing_is_written",
            "test_models_loading.py::test_a_model_that_cannot_be_loaded_is_named_with_the_reason",
        ),
    ),
    # ---- images ----
    "D1": Case(
        "LLaVA: the first word of an answer",
        "supervised, whatever the template's spaces",
        (
            "test_data_first_words.py::test_all_words_of_the_answers_are_supervised_and_no_others",
            "test_data_chat_template.py::test_what_is_tokenised_apart_gets_no_space_that_the_text_does_not_have",
            "test_data_templates.py::test_every_kind_of_row_comes_out_as_the_template_renders_it_or_is_refused_with_a_true_reason",
            "test_data_images.py::test_the_answers_and_their_stop_tokens_are_supervised_and_nothing_else",
        ),
    ),
    "D2": Case(
        "LLaVA-OneVision, rows with several images",
        "tiles and tokens of apply_chat_template",
        (
            "test_data_visual_batch.py::test_rows_come_out_as_the_chat_template_of_the_processor_makes_them",
            "test_data_visual_batch.py::test_each_row_owns_its_part_of_the_visual_tensors",
        ),
    ),
    "D3": Case(
        "sizes of images: of a part, of a run",
        "a part's are a bad row; data.processor_kwargs for the run",
        (
            "test_data_images.py::test_a_row_whose_images_cannot_be_used_says_why",
            "test_vision_processors.py::test_settings_of_a_run_reach_the_processor_and_stay_with_what_it_saves",
            "test_data_pixels.py::test_settings_reach_the_processor_of_each_side",
            "test_vision_processors.py::test_settings_are_part_of_what_rows_are_stored_by",
            "test_vision_processors.py::test_a_setting_that_a_processor_does_not_have_is_refused",
            "test_vision_processors.py::test_a_setting_that_a_processors_class_overrides_is_refused",
            "test_vision_processors.py::test_a_model_of_text_has_no_settings_for_images",
            "test_vision_processors.py::test_settings_of_a_processor_among_those_of_its_model_are_refused_before_anything_is_loaded",
        ),
    ),
    "D4": Case(
        "transparent pictures",
        "on white, and counted",
        (
            "test_data_images.py::test_transparent_parts_are_white_and_counted",
            "test_data_pixels.py::test_a_picture_reaches_the_model_as_a_person_sees_it",
            "test_data_pixels.py::test_pictures_of_a_data_file_reach_the_model_of_every_family_so",
        ),
    ),
    "D5": Case(
        "16-bit greyscale, floating-point pixels",
        "scaled to 8 bits; refused",
        (
            "test_data_images.py::test_greyscale_of_16_bits_is_scaled_and_noted",
            "test_data_pixels.py::test_a_picture_reaches_the_model_as_a_person_sees_it",
            "test_data_pixels.py::test_pictures_of_a_data_file_reach_the_model_of_every_family_so",
            "test_data_images.py::test_pixels_without_a_known_white_are_refused",
        ),
    ),
    "D6": Case(
        "the line break beside <image>",
        "belongs to the placeholder, with a note",
        ("test_data_images.py::test_the_line_break_beside_a_placeholder_is_not_part_of_the_question",),
    ),
    "D7": Case(
        "which image: two sources, links, places in text",
        "the one that is meant, or a bad row",
        (
            "test_data_images.py::test_a_row_whose_images_cannot_be_used_says_why",
            "test_data_images.py::test_bytes_that_differ_from_the_file_of_their_path_are_refused",
            "test_data_images.py::test_a_path_through_a_link_opens_the_file_that_the_system_opens",
            "test_data_media.py::test_a_model_with_images_is_never_trained_on_text_that_stands_for_one",
            "test_data_images.py::test_images_take_their_places_in_order",
        ),
    ),
    "D8": Case(
        "an unusual image that does not fit, in the middle",
        "found before the first step, in training and evaluation",
        (
            "test_vision_processors.py::test_an_unusual_image_that_does_not_fit_the_teacher_is_found_before_the_first_step",
            "test_data_images.py::test_the_most_unusual_images_of_each_source_are_known_with_their_places",
        ),
    ),
    "D9": Case(
        "an image that was unreadable, or was replaced",
        "tried again, encoded anew",
        (
            "test_data_images.py::test_an_image_that_could_not_be_read_is_tried_again",
            "test_data_images.py::test_an_image_that_was_replaced_without_a_trace_in_size_and_time_is_encoded_anew",
        ),
    ),
    "D10": Case(
        "no patch_size; forms of base64, paths and names",
        "file and side named; forms are read; a lost image is one line",
        (
            "test_vision_processors.py::test_a_processor_without_its_patch_size_is_named_with_its_file_and_side",
            "test_data_images.py::test_an_image_is_the_same_however_it_is_given",
            "test_data_images.py::test_an_image_part_of_anthropics_holds_its_own_image",
            "test_data_images.py::test_a_name_is_found_in_either_form_of_unicode",
            "test_vision_processors.py::test_paths_of_images_may_be_relative_to_another_folder",
            "test_vision_processors.py::test_an_image_lost_in_a_worker_is_one_line",
        ),
    ),
    # ---- vision models ----
    "E1": Case(
        "language model frozen, a micro-batch without images",
        "counts in D and the log, gradient zero, on every rank",
        (
            "test_vision_edges.py::test_rows_without_images_count_and_teach_nothing_where_the_language_model_is_frozen",
            "test_vision_edges.py::test_a_frozen_language_model_with_checkpointing_trains_the_same",
            "test_vision_edges.py::test_an_adapter_on_the_tower_alone_trains_beside_rows_without_images",
            "test_trainer_stand_ins.py::test_windows_without_images_are_no_steps_where_the_language_model_is_frozen",
        ),
    ),
    "E2": Case(
        "LoRA in the tower with reentrant checkpointing",
        "refused; tensors without a gradient are named",
        (
            "test_vision_edges.py::test_reentrant_checkpointing_of_a_tower_trained_in_parts_is_refused",
            "test_vision_edges.py::test_two_ranks_refuse_reentrant_checkpointing_and_name_tensors_without_a_gradient_once",
            "test_trainer_watch.py::test_trained_tensors_that_never_get_a_gradient_are_named_once",
            "test_trainer_watch.py::test_no_tensor_is_named_where_all_are_trained",
        ),
    ),
    "E3": Case(
        "names that hit the tower too; a frozen part to save",
        "trained parameters per part in the plan; an error",
        (
            "test_models_parts.py::test_trained_parameters_are_counted_by_part",
            "test_models_parts.py::test_naming_a_frozen_part_for_training_is_an_error",
            "test_models_parts.py::test_names_that_reach_other_parts_too_are_what_freezing_is_for",
            "test_vision_fit.py::test_the_plan_says_what_is_trained_of_each_part_and_a_frozen_part_is_not_named_for_training",
        ),
    ),
    "E4": Case(
        "a processor that does not fit its model",
        "exit 3 naming the side",
        (
            "test_models_probe.py::test_a_processor_that_does_not_fit_its_model_is_told_with_its_side",
            "test_models_probe.py::test_processors_that_fit_are_not_suspected",
            "test_models_probe.py::test_no_familys_own_processor_is_suspected",
            "test_models_probe.py::test_a_look_at_an_image_reads_raw_rows_of_the_class_as_well",
        ),
    ),
    # ---- right already ----
    "M1": Case(
        "tied weights, both dtypes",
        "saved once in that type, loaded as one",
        (
            "test_usual_runs.py::test_tied_weights_are_saved_once_in_the_students_type_and_load_as_one",
            "test_models_load_report.py::test_what_a_text_model_saves_is_loaded_as_it_was",
            "test_models_tuning.py::test_a_trained_copy_of_a_tied_head_is_the_same_after_reload_and_merge",
        ),
    ),
    "M2": Case(
        "odd generation configs",
        "saved, and not used for samples",
        (
            "test_runs_export.py::test_an_adapter_is_merged_and_all_that_a_chat_needs_comes_along",
            "test_trainer.py::test_samples_are_not_bent_by_the_models_own_generation_config",
            "test_cli.py::test_the_saved_config_keeps_its_cache_and_the_saved_model_stops_where_the_template_ends_a_turn",
        ),
    ),
    "M3": Case(
        "the padding side of a tokenizer",
        "changes no number",
        (
            "test_usual_runs.py::test_the_padding_side_of_a_tokenizer_changes_no_number",
            "test_python_class.py::test_a_batch_padded_on_the_left_has_the_loss_of_one_padded_on_the_right",
        ),
    ),
    "M4": Case(
        "chat templates from every place",
        "read",
        (
            "test_usual_runs.py::test_a_chat_template_is_read_from_every_place",
            "test_usual_runs.py::test_a_chat_template_of_a_processor_is_read_from_every_place",
        ),
    ),
    "M5": Case(
        "truncation inside tokenizer.json",
        "cuts no row",
        ("test_usual_runs.py::test_a_tokenizer_that_cuts_and_pads_by_itself_cuts_and_pads_no_row",),
    ),
    "M6": Case(
        "new tokens with every LoRA kind",
        "run, reload and merge agree",
        (
            "test_adapters_as_models.py::test_a_model_with_new_tokens_computes_the_same_trained_reloaded_and_merged",
            "test_adapters_as_models.py::test_a_merged_model_is_base_and_adapter_and_its_saved_form_too",
            "test_models_merging.py::test_merged_logits_are_the_unmerged_ones",
        ),
    ),
    "M7": Case(
        "load_best_model_at_end",
        "the best step is saved",
        (
            "test_early_stopping.py::test_it_stops_where_patience_ends_and_says_which_step_won",
            "test_early_stopping.py::test_a_resumed_run_stops_where_the_uninterrupted_one_does_bit_for_bit",
        ),
    ),
    "M8": Case(
        "checkpointing modes, frozen parts, ranks",
        "change no number",
        (
            "test_usual_runs.py::test_a_run_with_a_usual_option_learns_and_its_model_loads",
            "test_feature_kd_hooks.py::test_gradient_checkpointing_changes_nothing",
            "test_vision_edges.py::test_a_frozen_language_model_with_checkpointing_trains_the_same",
            "test_models_parts.py::test_frozen_parts_do_not_move_in_a_step_and_the_others_do",
        ),
    ),
    "M9": Case(
        "resume with workers",
        "bit for bit",
        ("test_usual_runs.py::test_a_run_with_workers_goes_on_bit_for_bit",),
    ),
    "M10": Case(
        "NEFTune, adafactor, plateau and WSD schedulers",
        "learn, and what is saved loads",
        ("test_usual_runs.py::test_a_run_with_a_usual_option_learns_and_its_model_loads",),
    ),
    "M11": Case(
        "DoRA",
        "as a float64 loop",
        ("test_oracle.py::test_weights_equal_those_of_a_float64_loop",),
    ),
    "M12": Case(
        "evaluation batch sizes",
        "change no figure",
        (
            "test_trainer.py::test_evaluation_is_a_mean_over_tokens_whatever_the_batch_size",
            "test_trainer_evaluation.py::test_batches_padding_and_the_order_of_rows_change_nothing",
        ),
    ),
    "M13": Case(
        "Gemma2, Cohere2, sliding windows",
        "as the reference; not suspected",
        (
            "test_trainer.py::test_other_families_match_the_reference",
            "test_models_probe.py::test_a_causal_model_is_not_suspected",
            "test_oracle.py::test_weights_equal_those_of_a_float64_loop",
        ),
    ),
    "M14": Case(
        "GPT-2's Conv1D with LoRA",
        "merged as it runs",
        ("test_usual_runs.py::test_an_adapter_on_the_transposed_layers_of_gpt2_is_merged_as_it_runs",),
    ),
    "M15": Case(
        "code in a model folder",
        "exit 3, naming the option; it does not run",
        ("test_usual_runs.py::test_code_in_a_model_folder_does_not_run",),
    ),
    "I1": Case(
        "EXIF",
        "upright",
        (
            "test_data_pixels.py::test_a_picture_reaches_the_model_as_a_person_sees_it",
            "test_data_images.py::test_images_are_turned_upright_as_for_inference",
        ),
    ),
    "I2": Case(
        "CMYK, 1-bit and palette pictures",
        "as a person sees them",
        (
            "test_data_pixels.py::test_a_picture_reaches_the_model_as_a_person_sees_it",
            "test_data_images.py::test_other_modes_stay_as_they_were",
            "test_data_images.py::test_pillow_images_of_a_source_in_memory_are_those_of_a_batch_whatever_their_mode",
        ),
    ),
    "I3": Case(
        "pictures of 1 by 1 to 200 by 2",
        "as the processor takes them",
        ("test_data_pixels.py::test_a_picture_reaches_the_model_as_a_person_sees_it",),
    ),
    "I4": Case(
        "decompression bombs",
        "a bad row",
        ("test_data_images.py::test_an_image_that_would_fill_the_memory_is_a_bad_row_however_it_is_given",),
    ),
    "I5": Case(
        "several images, mixed rows",
        "each row as alone",
        (
            "test_data_visual_batch.py::test_a_row_in_a_mixed_batch_is_computed_as_on_its_own",
            "test_data_visual_batch.py::test_each_row_owns_its_part_of_the_visual_tensors",
        ),
    ),
    "I6": Case(
        "image tokens cut by max_length",
        "the row is left out and counted",
        (
            "test_data_images.py::test_no_length_cuts_an_image",
            "test_data_images.py::test_rows_that_would_lose_image_tokens_or_their_answer_are_dropped_and_counted",
        ),
    ),
    "I7": Case(
        "240 sizes of images",
        "memory does not grow",
        ("test_data_pixels.py::test_many_sizes_of_images_take_no_more_memory",),
    ),
    "I8": Case(
        "saved processors, merged vision students",
        "read by plain transformers",
        (
            "test_vision_processors.py::test_settings_of_a_run_reach_the_processor_and_stay_with_what_it_saves",
            "test_runs_export.py::test_a_vision_student_comes_with_its_processor_and_without_projectors",
            "test_vision_fit.py::test_a_run_trains_student_and_projectors_and_exports_the_student_alone",
        ),
    ),
    "I9": Case(
        "ranks without images",
        "train as one process",
        ("test_vision_fit.py::test_two_ranks_of_which_one_has_no_image_train_as_one_process",),
    ),
    "P1": Case(
        "what the probe looks at before the first step",
        "one list; under two forwards of each model",
        (
            "test_models_probe.py::test_a_look_costs_one_forward_and_leaves_a_model_and_the_random_state_as_they_were",
            "test_models_probe.py::test_looks_at_text_and_image_cost_under_two_forwards_of_one_row_of_each_model",
            "test_models_probe.py::test_what_looks_at_text_and_image_find_of_both_models_is_one_list",
        ),
    ),
}


if __name__ == "__main__":
    sys.exit(tables.run(TABLE, sys.argv[1:] or list(TABLE), "case"))
