"""The fault table: what kdtrain does about each fault, and the tests that show it. `make faults` runs all of them.

Run it as `python -m tests.faults [ROW …]`. It prints a row per fault with its tests and their time.
"""

from __future__ import annotations

import sys

from tests import tables
from tests.tables import Row as Fault

TABLE: dict[int, Fault] = {
    1: Fault(
        "same config twice",
        "identical losses and weights",
        ("test_same_numbers.py::test_the_same_config_twice_gives_the_same_losses_and_weights",),
    ),
    2: Fault(
        "resume from every saved step",
        "bitwise equal to the uninterrupted run",
        (
            "test_trainer_resume.py::test_a_run_resumed_at_any_step_equals_the_uninterrupted_one_bit_for_bit",
            "test_on_policy.py::test_a_run_resumed_at_any_step_samples_and_trains_on_bit_for_bit",
            "test_vision_fit.py::test_a_resumed_run_has_the_weights_optimizer_and_projectors_of_its_checkpoint",
            "test_teachers_itself.py::test_a_resumed_run_has_the_same_average_and_weights_bit_for_bit",
            "test_early_stopping.py::test_a_resumed_run_stops_where_the_uninterrupted_one_does_bit_for_bit",
        ),
    ),
    3: Fault(
        "kill -9 at nine points inside a save",
        "newest complete checkpoint used, skipped ones named",
        (
            "test_runs_kills.py::test_killed_inside_a_save_it_goes_on_from_the_newest_complete_one_bit_for_bit",
            "test_runs_kills.py::test_killed_at_every_point_inside_a_save_it_goes_on_from_the_newest_complete_one",
            "test_runs_checkpoints.py::test_a_step_that_is_saved_again_replaces_the_one_before_only_when_it_is_complete",
            "test_runs_checkpoints.py::test_what_a_killed_process_was_removing_is_removed_and_never_taken",
            "test_runs_checkpoints.py::test_all_files_are_on_the_disk_before_the_manifest_is_and_it_before_its_name",
        ),
    ),
    4: Fault(
        "kill -9 at random times",
        "resumes or starts clean, never a traceback",
        (
            "test_runs_kills.py::test_killed_at_three_random_times_it_ends_as_if_nobody_had",
            "test_runs_kills.py::test_killed_at_25_random_times_it_always_goes_on_and_ends_as_if_nobody_had",
        ),
    ),
    5: Fault(
        "damaged file in the newest checkpoint",
        "skipped with its reason, older one used; none left: exit 6",
        (
            "test_runs_checkpoints.py::test_a_damaged_file_of_any_kind_is_skipped_by_auto_and_refused_by_name",
            "test_runs_checkpoints.py::test_where_all_are_damaged_the_run_ends_with_6_and_nothing_is_written_over",
            "test_runs_checkpoints.py::test_a_checkpoint_of_another_tool_is_taken_with_a_line_that_says_so",
            "test_runs_checkpoints.py::test_without_a_manifest_what_cannot_be_read_is_skipped",
            "test_runs_checkpoints.py::test_a_checkpoint_whose_optimizer_state_is_not_finite_is_not_taken",
            "test_runs_checkpoints.py::test_a_model_alone_is_no_state_to_go_on_from_and_the_finished_model_stays",
            "test_runs_checkpoints.py::test_sizes_alone_are_compared_where_that_is_asked_for",
        ),
    ),
    6: Fault(
        "--resume PATH of an incomplete checkpoint",
        "refused: which file and why, exit 6",
        (
            "test_runs_checkpoints.py::test_a_damaged_file_of_any_kind_is_skipped_by_auto_and_refused_by_name",
            "test_cli.py::test_an_incomplete_checkpoint_is_refused_by_name_and_skipped_by_auto",
        ),
    ),
    7: Fault(
        "resume with changed model, tokenizer, loss or data",
        "refused with a key-by-key difference",
        (
            "test_config_changes.py::test_every_option_has_a_class_and_no_other_name_has_one",
            "test_config_changes.py::test_a_change_is_found_with_its_class",
            "test_runs_changed.py::test_a_changed_option_is_refused_and_the_command_that_insists_goes_on",
            "test_runs_changed.py::test_what_cannot_be_loaded_is_refused_whatever_is_allowed",
            "test_runs_changed.py::test_another_model_under_the_same_path_is_refused",
            "test_runs_changed.py::test_another_teacher_is_refused_and_one_that_was_moved_is_the_same",
            "test_runs_changed.py::test_another_chat_template_is_refused",
        ),
    ),
    8: Fault(
        "SIGTERM in forward, accumulation, generation, save",
        "checkpoint complete, exit 143, resume bitwise",
        (
            "test_signals.py::test_while_training_the_first_signal_is_noted_and_a_later_one_ends_at_once",
            "test_runs_launch.py::test_a_signal_saves_and_the_run_goes_on_from_there",
            "test_runs_stopping.py::test_an_evaluation_is_left_after_its_batch_and_made_by_the_resumed_run",
        ),
    ),
    9: Fault(
        "SIGINT once; twice",
        "as 8 with 130; at once, older checkpoint intact",
        (
            "test_signals.py::test_while_training_the_first_signal_is_noted_and_a_later_one_ends_at_once",
            "test_runs_launch.py::test_ctrl_c_stops_both_of_two_launched_ranks",
            "test_signals.py::test_ctrl_c_while_a_program_imports_ends_it_without_a_traceback",
        ),
    ),
    10: Fault(
        "SIGTERM to one of two ranks",
        "both stop at the same step",
        (
            "test_runs_launch.py::test_sigterm_to_one_rank_stops_both_at_the_same_step",
            "test_runs_stopping.py::test_a_signal_to_one_of_two_ranks_in_an_evaluation_stops_both_after_the_same_batch",
        ),
    ),
    11: Fault(
        "one rank raises or is killed",
        "status.json says failed, last complete checkpoint intact",
        (
            "test_runs_launch.py::test_a_rank_that_is_killed_ends_the_run_and_that_is_said",
            "test_runs_launch.py::test_a_worker_that_fails_gives_the_launcher_its_exit_code",
            "test_runs_stopping.py::test_a_rank_whose_connection_breaks_says_that_another_one_has_ended",
        ),
    ),
    12: Fault(
        "NaN or inf in loss, gradient, targets",
        "stop before the step, exit 5, origin named",
        (
            "test_nonfinite.py::test_the_file_has_step_rank_terms_rows_and_their_source",
            "test_nonfinite.py::test_targets_that_are_handed_over_are_the_teachers",
            "test_nonfinite.py::test_a_users_top_k_targets_that_are_no_numbers_name_the_teacher_and_the_rows",
            "test_nonfinite.py::test_a_users_top_k_targets_that_are_no_distributions_are_the_teachers_fault",
            "test_nonfinite.py::test_all_ranks_say_the_same_and_only_the_bad_micro_batch_is_listed",
            "test_nonfinite.py::test_the_checkpoint_before_is_intact_named_and_gone_on_from",
            "test_nonfinite.py::test_an_evaluation_stops_at_its_first_bad_batch",
            "test_nonfinite.py::test_a_bad_rank_ends_the_evaluation_of_both",
            "test_nonfinite.py::test_the_command_evaluate_names_the_model_and_the_row",
            "test_trainer.py::test_a_nan_stops_the_run_before_the_optimizer_step",
            "test_trainer.py::test_an_infinite_loss_with_a_finite_gradient_stops_the_run_too",
            "test_trainer.py::test_a_loss_that_is_not_finite_on_one_rank_stops_both",
            "test_trainer_watch.py::test_weights_that_are_not_finite_are_never_saved",
        ),
    ),
    13: Fault(
        "every token of a batch masked; of the data",
        "loss 0 with a gradient path; error before training",
        (
            "test_nonfinite.py::test_a_masked_micro_batch_among_good_ones_changes_nothing",
            "test_nonfinite.py::test_a_masked_micro_batch_of_one_rank_changes_nothing",
            "test_nonfinite.py::test_a_window_that_is_all_masked_is_a_step_of_loss_0",
            "test_nonfinite.py::test_data_that_supervises_nothing_is_an_error_before_training",
            "test_losses_fused.py::test_no_supervised_token_is_a_zero_with_a_gradient_path",
        ),
    ),
    14: Fault(
        "disk full while saving",
        "exit 6 with path and bytes; older checkpoint intact",
        (
            "test_disk.py::test_a_file_that_does_not_fit_is_one_error_whoever_writes_it",
            "test_disk.py::test_a_disk_that_fills_up_while_a_checkpoint_is_saved_leaves_the_older_one_and_the_run_goes_on",
            "test_disk.py::test_a_file_that_may_not_be_as_large_as_the_model_ends_the_run_where_nothing_is_mounted",
            "test_disk.py::test_a_log_that_cannot_be_written_ends_the_run_with_its_state_saved",
            "test_runs_checkpoints.py::test_a_log_that_rank_0_cannot_write_stops_all_ranks_with_their_state_saved",
            "test_disk.py::test_the_error_is_not_hidden_by_a_status_that_cannot_be_written_either",
            "test_disk.py::test_encoded_rows_that_do_not_fit_are_exit_code_6",
            "test_disk.py::test_answers_of_the_teacher_that_do_not_fit_are_exit_code_6",
            "test_disk.py::test_other_commands_say_it_too",
            "test_disk.py::test_a_read_only_disk_in_the_middle_of_a_run",
            "test_runs_final_model.py::test_a_model_that_cannot_be_written_whole_leaves_the_one_before_it",
        ),
    ),
    15: Fault(
        "output folder read-only, a file, not empty",
        "refused, nothing written, both ways out named",
        (
            "test_no_bug.py::test_what_can_be_no_name_of_a_file_is_an_error_of_the_config",
            "test_no_bug.py::test_names_that_are_odd_are_names",
            "test_cli.py::test_a_world_that_does_not_fit_is_exit_code_2_or_3_and_nothing_is_written",
        ),
    ),
    16: Fault(
        "checkpoints larger than the free disk",
        "a finding with the numbers",
        (
            "test_preflight_memory.py::test_disk_for_checkpoints_is_compared_with_what_is_free",
            "test_runs_sweep.py::test_runs_that_have_no_room_together_are_refused_before_the_first",
        ),
    ),
    17: Fault(
        "teacher 429 with Retry-After, 503, reset, then fine",
        "same result as without; counted",
        (
            "test_teachers_http.py::test_a_busy_a_failing_and_a_broken_server_change_nothing_but_the_counts",
            "test_runs_served.py::test_a_server_that_is_slow_busy_and_down_for_a_while_changes_no_number",
        ),
    ),
    18: Fault(
        "teacher slow or silent",
        "limits per request and in total, exit 4, state saved",
        (
            "test_teachers_http.py::test_a_silent_and_a_dripping_server_end_within_the_total_limit",
            "test_teachers_http.py::test_a_wait_longer_than_the_total_limit_is_refused_at_once",
            "test_runs_served.py::test_a_teacher_that_fails_while_training_ends_the_run_with_its_state_saved",
            "test_runs_served.py::test_it_goes_on_as_if_the_server_had_never_been_away",
        ),
    ),
    19: Fault(
        "teacher 400, 401, 403, 404",
        "no retry, exit 4 (3 before training), key not shown",
        (
            "test_teachers_http.py::test_a_request_that_is_refused_is_not_sent_again",
            "test_teachers_http.py::test_a_refused_key_and_a_missing_one_name_the_variable_to_look_at",
            "test_runs_served.py::test_the_key_is_in_no_file_and_on_neither_stream",
        ),
    ),
    20: Fault(
        "teacher answers truncated JSON, HTML, another shape",
        "one retry, then an error with its beginning",
        (
            "test_teachers_http.py::test_a_reply_that_cannot_be_read_is_asked_for_once_more",
            "test_teachers_http.py::test_a_reply_of_another_shape_is_asked_for_once_more_and_says_what_the_reader_said",
            "test_teachers_replies.py::test_a_reply_of_another_shape_is_refused",
            "test_teachers_http.py::test_what_a_server_says_is_shown_short_and_escaped",
        ),
    ),
    21: Fault(
        "teacher's positions, ids or numbers are wrong",
        "refused with position and reason",
        (
            "test_teachers_replies.py::test_a_reply_that_is_not_as_it_must_be_is_refused_with_position_and_reason",
            "test_teachers_replies.py::test_choices_belong_to_the_rows_that_their_index_names",
            "test_teachers_replies.py::test_ranks_and_log_probabilities_that_contradict_each_other_are_refused",
        ),
    ),
    22: Fault(
        "server restarts with another model",
        "noticed on reconnect",
        (
            "test_teachers_http.py::test_a_server_that_comes_back_with_another_model_is_noticed_before_its_reply_is_used",
            "test_runs_served.py::test_another_model_behind_the_same_address_ends_the_run",
        ),
    ),
    23: Fault(
        "redirects, other schemes, userinfo, plain http",
        "refused; the key goes to its origin only",
        (
            "test_teachers_http.py::test_a_redirect_is_not_followed_and_its_host_gets_nothing",
            "test_teachers_http.py::test_an_address_that_is_refused_makes_no_servers",
            "test_teachers_http.py::test_a_key_is_not_sent_unencrypted_to_another_machine",
            "test_config_server_urls.py::test_an_address_that_is_none_of_a_server_is_refused_without_repeating_it",
            "test_config_server_urls.py::test_addresses_where_clouds_hand_out_credentials_are_refused_in_every_spelling",
        ),
    ),
    24: Fault(
        "API key in the environment, in YAML, in a URL",
        "in no output and no file of the run",
        (
            "test_secrets.py::test_an_option_that_holds_a_secret_is_refused_and_not_repeated",
            "test_secrets.py::test_a_line_that_is_shown_hides_the_secret_in_it",
            "test_secrets.py::test_a_key_on_the_command_line_is_not_repeated",
            "test_secrets.py::test_the_environment_is_in_no_file_of_a_run_and_what_follows_it",
            "test_secrets.py::test_the_environment_is_not_told_when_a_run_fails",
            "test_runs_served.py::test_the_key_is_in_no_file_and_on_neither_stream",
        ),
    ),
    25: Fault(
        "YAML: tags, alias bomb, depth, size, duplicates",
        "exit 2, one line, under 1 s and 200 MB",
        (
            "test_config_yaml.py::test_a_hostile_or_broken_file_is_one_short_error_at_once",
            "test_config_yaml.py::test_a_file_that_is_not_utf8_is_named_with_its_line",
            "test_fuzz.py::test_no_config_ends_in_a_traceback_or_takes_long",
            "test_fuzz.py::test_ten_thousand_configs",
        ),
    ),
    26: Fault(
        "wrong types, unknown keys, conflicts",
        "all of them in one run, each with place and fix",
        (
            "test_config_rules.py::test_wrong_types_unknown_keys_bad_choices_and_conflicts_come_in_one_run",
            "test_config_yaml.py::test_every_duplicate_key_and_every_nan_is_reported_with_the_rest",
            "test_config_rules.py::test_an_unknown_or_misplaced_key_is_an_error_that_names_the_right_one",
        ),
    ),
    27: Fault(
        "path traversal, symlinks in names",
        "the resolved path stays inside",
        (
            "test_runs_checkpoints.py::test_only_checkpoints_of_the_run_are_removed",
            "test_runs_checkpoints.py::test_a_folder_that_a_user_has_put_in_the_place_of_a_checkpoint_is_kept",
        ),
    ),
    28: Fault(
        "model folder with code or pickled weights",
        "refused without opt-in, payload never runs",
        (
            "test_cli.py::test_weights_as_a_pickle_are_refused_and_never_loaded",
            "test_no_bug.py::test_a_damaged_model_is_named",
            "test_no_bug.py::test_a_damaged_adapter_is_named",
            "test_models_load_report.py::test_weights_that_do_not_fit_the_architecture_are_refused_by_name",
        ),
    ),
    29: Fault(
        "cache or data set with pickle or a script",
        "refused",
        (
            "test_data_dataset.py::test_a_file_that_cannot_be_read_says_why",
            "test_teachers_cached.py::test_a_pickle_in_place_of_a_file_is_refused_and_never_run",
        ),
    ),
    30: Fault(
        "vocabulary or special tokens differ",
        "an error before training with sizes and first ids",
        ("test_cli.py::test_a_vocabulary_mismatch_is_exit_code_3_and_names_both",),
    ),
    31: Fault(
        "bad rows",
        "counted, first three shown; over the limit stops",
        (
            "test_no_bug.py::test_damaged_data_is_named",
            "test_data_dataset.py::test_bad_rows_are_counted_and_the_first_three_shown_with_their_lines",
            "test_data_dataset.py::test_more_bad_rows_than_allowed_stop_the_run_and_are_listed",
            "test_data_dataset.py::test_over_long_rows_are_an_error_by_default",
            "test_data_images.py::test_a_row_whose_images_cannot_be_used_says_why",
            "test_data_files.py::test_a_packed_file_that_is_cut_or_damaged_says_so",
            "test_fuzz.py::test_no_data_ends_in_a_traceback",
            "test_fuzz.py::test_five_thousand_files_of_data",
        ),
    ),
    32: Fault(
        "offline, broken hub cache",
        "file and variable named, no endless retry",
        (
            "test_mistakes.py::test_a_hub_id_that_cannot_be_had_is_asked_for_once_and_says_why",
            "test_mistakes.py::test_a_hub_that_does_not_answer_is_named_at_once",
            "test_mistakes.py::test_a_model_that_is_not_in_the_cache_says_so_offline",
            "test_data_dataset.py::test_a_hub_data_set_that_is_out_of_reach_says_what_to_do",
        ),
    ),
    33: Fault(
        "memory exhausted",
        "peak, batch, length and three remedies",
        (
            "test_memory.py::test_a_step_that_finds_no_memory_says_the_peak_rows_length_and_three_ways_out",
            "test_memory.py::test_a_model_that_finds_no_memory_while_it_is_loaded_is_named",
            "test_memory.py::test_a_cache_that_finds_no_memory_says_how_to_go_on",
            "test_memory.py::test_memory_that_really_runs_out_in_a_step",
            "test_memory.py::test_memory_that_runs_out_anywhere_else_is_no_bug_either",
        ),
    ),
    34: Fault(
        "tracker fails",
        "training goes on, one warning, logging.jsonl complete",
        (
            "test_trackers.py::test_a_tracker_that_fails_in_any_of_its_hooks_is_one_warning",
            "test_trackers.py::test_the_model_is_saved_before_a_tracker_comes_to_its_end_and_one_that_hangs_is_left",
            "test_trackers.py::test_tensorboard_without_a_place_to_write_to",
            "test_trackers.py::test_what_a_caller_s_own_callback_raises_is_raised",
        ),
    ),
    35: Fault(
        "push fails at the end",
        "model is saved first; retry command printed",
        (
            "test_runs_final_model.py::test_a_push_that_fails_at_the_end_leaves_the_saved_model_and_says_the_command",
            "test_runs_final_model.py::test_a_push_that_fails_in_the_middle_is_a_warning",
            "test_runs_export.py::test_a_push_that_fails_keeps_the_folder_and_says_how_to_go_on",
        ),
    ),
    36: Fault(
        "control characters in data, names, server errors",
        "shown escaped",
        ("test_cli_streams.py::test_control_characters_of_a_server_or_the_hub_are_shown_escaped",),
    ),
    37: Fault(
        "--help, validate, schema, env",
        "no torch imported, under 1 s",
        ("test_cli.py::test_what_needs_no_torch_answers_in_a_second_without_it",),
    ),
    38: Fault(
        "two runs in one run directory",
        "second refused; a stale lock recognised",
        (
            "test_runs_lock.py::test_a_second_run_in_a_folder_is_refused_at_once_with_who_holds_it_and_leaves_it_alone",
            "test_runs_lock.py::test_the_lock_of_a_killed_process_is_taken_over_and_gone_at_the_end",
            "test_runs_lock.py::test_one_that_gives_none_is_taken_over_whatever_its_clock_says",
            "test_runs_lock.py::test_of_a_run_that_cannot_be_seen_from_here_one_waits_for_a_sign_of_life",
        ),
    ),
    39: Fault(
        "resume into, or output_dir at, a model or data folder",
        "refused before anything is written",
        (
            "test_cli.py::test_a_run_never_writes_over_what_it_reads",
            "test_config_folders.py::test_an_output_folder_that_is_holds_or_lies_in_what_is_read_is_an_error",
            "test_config_folders.py::test_the_model_below_an_adapter_is_not_written_over_either",
            "test_config_folders.py::test_a_folder_of_images_or_encoded_rows_may_hold_a_run_and_be_none",
        ),
    ),
    40: Fault(
        "model folder lacks or renames a weight",
        "exit 3 with the keys",
        (
            "test_no_bug.py::test_a_damaged_model_is_named",
            "test_models_load_report.py::test_weights_that_do_not_fit_the_architecture_are_refused_by_name",
        ),
    ),
    41: Fault(
        "resume from an older checkpoint, stop, --resume auto",
        "the newest of the current line",
        (
            "test_runs_checkpoints.py::test_a_run_that_goes_on_from_an_older_checkpoint_leaves_a_branch_and_follows_its_own",
            "test_runs_checkpoints.py::test_a_run_that_ends_before_its_first_save_goes_on_from_where_it_went_on_from",
        ),
    ),
    42: Fault(
        "SIGHUP, SIGUSR1, SIGXCPU",
        "as 8",
        (
            "test_signals.py::test_every_command_ends_with_the_code_of_the_signal_and_a_line",
            "test_signals.py::test_what_announces_the_end_comes_again_while_the_state_is_saved",
            "test_signals.py::test_a_signal_that_is_ignored_from_the_beginning_stays_ignored",
        ),
    ),
    43: Fault(
        "launcher killed with -9",
        "workers end within 30 s, lock freed",
        (
            "test_runs_launch.py::test_ranks_end_with_their_launcher_and_leave_a_checkpoint",
            "test_runs_parent.py::test_a_process_that_hangs_is_killed_with_what_it_has_started",
            "test_runs_parent.py::test_a_process_that_no_launcher_has_started_goes_on",
        ),
    ),
    44: Fault(
        "stdout or stderr closed or full",
        "training goes on, model saved, exit 0",
        (
            "test_cli_streams.py::test_a_process_outlives_its_streams",
            "test_cli_streams.py::test_training_goes_on_and_the_model_is_saved",
            "test_cli_streams.py::test_a_run_of_its_own_outlives_its_streams",
            "test_cli_streams.py::test_a_run_outlives_its_terminal",
            "test_cli_streams.py::test_a_command_that_only_prints_ends_silently_without_a_reader_and_not_on_a_full_disk",
        ),
    ),
    45: Fault(
        "data file's content changed before a resume",
        "refused, or allowed by name",
        (
            "test_runs_changed.py::test_other_rows_under_the_same_path_are_refused_or_allowed_by_name",
            "test_runs_changed.py::test_data_that_were_only_moved_are_the_same_and_the_source_that_changed_is_named",
            "test_runs_changed.py::test_a_limit_counts_by_the_rows_that_it_leaves",
        ),
    ),
    46: Fault(
        "NaN teacher writes answers or samples",
        "exit 5",
        (
            "test_on_policy_errors.py::test_a_model_whose_logits_are_not_finite_while_it_writes_ends_the_run_and_is_named",
            "test_on_policy_errors.py::test_a_teacher_whose_logits_are_not_finite_on_samples_ends_the_run",
            "test_nonfinite.py::test_a_model_that_writes_or_judges_samples_is_named_with_the_rows",
        ),
    ),
    47: Fault(
        "read-only HOME, few files, umask, C locale, odd paths",
        "runs; a temporary cache is said",
        (
            "test_runs_stopping.py::test_a_locale_that_is_not_utf_8_and_odd_names_do_no_harm",
            "test_runs_checkpoints.py::test_other_users_may_read_weights_as_they_may_other_files",
            "test_trainer_startup_checks.py::test_workers_that_need_more_open_files_than_there_may_be_are_refused",
        ),
    ),
    48: Fault(
        "run folder moved or deleted meanwhile",
        "exit 6, nothing written elsewhere",
        (
            "test_disk.py::test_a_run_whose_folder_goes_away_writes_nothing_elsewhere",
            "test_disk.py::test_a_log_is_not_begun_anew_in_a_folder_that_has_taken_the_place_of_the_run_s",
        ),
    ),
    49: Fault(
        "WORLD_SIZE set without a launcher",
        "a message within 20 s",
        (
            "test_cli_meeting.py::test_a_process_that_nobody_comes_to_ends_and_says_so",
            "test_cli_meeting.py::test_left_over_variables_are_named_before_anything_is_waited_for",
        ),
    ),
    50: Fault(
        "two processes encode the same data",
        "both succeed",
        (
            "test_data_cache_processes.py::test_two_processes_that_encode_the_same_rows_at_once_both_succeed",
            "test_data_cache_processes.py::test_two_processes_that_encode_the_same_rows_at_once_both_succeed_50_times",
            "test_data_cache_processes.py::test_an_entry_that_another_process_has_just_stored_stays",
            "test_data_cache_processes.py::test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays",
        ),
    ),
    51: Fault(
        "processor with matrix units, other call orders",
        "same numbers",
        (
            "test_same_numbers.py::test_another_processor_and_other_threads_give_the_same_numbers",
            "test_same_numbers.py::test_two_threads_give_the_numbers_of_one",
        ),
    ),
}


if __name__ == "__main__":
    sys.exit(tables.run(TABLE, [int(row) for row in sys.argv[1:]] or list(TABLE), "fault"))
