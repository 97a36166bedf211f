//! A running Sluice: reloads good and bad, signals, daemons and keepers that die, bans by hand.

mod bans;
mod life;
mod log;
mod path;
mod reload;
mod stage;

use std::process::ExitCode;

use bans::*;
use life::*;
use log::*;
use path::*;
use reload::*;
use rig::{harness, tests};
use stage::{Stage, last_words};

fn main() -> ExitCode {
    harness::main(
        Stage::build,
        |_| last_words(),
        tests![
            a_bad_reload_changes_nothing_and_says_where_it_is_wrong,
            reloads_that_many_ask_for_at_once_are_few,
            a_reload_that_is_asked_for_during_another_reads_what_is_there_by_then,
            a_reload_during_the_start_of_a_new_daemon_waits_for_it,
            a_reload_adds_and_removes_listeners_and_a_taken_port_refuses_all_of_it,
            a_write_that_fails_half_way_is_taken_back,
            what_living_flows_and_attached_programs_stand_on_does_not_change,
            a_reload_that_does_not_fit_the_maps_is_refused_whole,
            a_daemon_that_dies_over_a_reload_leaves_the_generation_before,
            quit_drains_and_ends_and_forwarding_goes_on,
            draining_lets_an_exchange_end_and_takes_no_new_connection,
            a_killed_daemon_leaves_sockets_bans_and_tunables_to_the_next,
            a_killed_keeper_takes_its_daemon_along_and_a_new_one_adopts_the_rest,
            maps_of_another_size_are_not_adopted,
            pins_of_another_abi_or_hash_key_are_refused_and_those_of_others_stay,
            a_start_replaces_the_programs_under_load_and_loses_no_packet,
            the_keeper_has_the_capabilities_that_it_needs_and_no_other,
            the_daemon_has_no_terminal_no_file_of_the_keepers_starter_and_no_onlooker,
            a_ban_by_hand_stops_that_source_and_ends_by_itself,
            a_ban_closes_what_the_source_has_open_with_and_without_a_datapath,
            a_ban_of_an_ipv6_source_is_as_wide_as_its_network,
            bans_that_make_no_sense_or_do_not_fit_are_refused,
            without_a_datapath_too_bans_outlive_the_daemon,
            the_log_is_roots_file_and_usr1_opens_it_anew,
            a_log_that_must_not_be_written_refuses_start_and_reload,
            a_full_disk_costs_lines_that_are_counted_and_no_request,
            the_standard_output_may_be_a_file,
            a_reader_that_takes_nothing_holds_up_nobody,
            an_end_does_not_wait_for_a_reader_that_takes_nothing,
            an_endpoint_whose_link_is_down_gets_no_new_flows_until_it_is_back,
            a_connection_goes_to_the_worker_of_the_cpu_that_took_it,
        ],
    )
}
