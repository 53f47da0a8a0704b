/**
What the agent tells Prometheus. Everything of the datapath is read from the kernel at scrape time.
*/
import {Counter, Gauge, Registry} from 'prom-client';
import type {Datapath} from '../loader/datapath.js';
import {packageVersion} from '../loader/object.js';
import {sumCounters} from '../maps/schema.js';
import type {Round} from '../pods/reconcile.js';

/** The families that reasons are told apart by: a reason's first word, and what is left of it. */
const FAMILIES = [
	['redirected', 'sidestep_redirects_total', 'Connections sent to the proxy'],
	['bypass_', 'sidestep_bypasses_total', 'Connections left alone, by the rule that said so'],
	['refused_', 'sidestep_refusals_total', 'Connections refused because they could not be captured'],
	['accepted', 'sidestep_accepts_total', 'Redirected connections that reached the proxy with their original destination'],
	['connect_failed', 'sidestep_connect_failures_total', 'Redirected connections that the proxy did not answer'],
	['original_dst_lost', 'sidestep_original_dst_lost_total', 'Redirected connections whose original destination could not be carried to the proxy'],
] as const;

export class Metrics {
	readonly registry = new Registry();
	readonly #rounds = new Counter({name: 'sidestep_reconciles_total', help: 'Rounds of the control loop, by result', labelNames: ['result'], registers: [this.registry]});
	readonly #errors = new Counter({name: 'sidestep_reconcile_errors_total', help: 'Errors of the control loop, by what they concern', labelNames: ['kind'], registers: [this.registry]});
	readonly #duration = new Gauge({name: 'sidestep_reconcile_duration_seconds', help: 'How long the last round took', registers: [this.registry]});
	readonly #last = new Gauge({name: 'sidestep_reconcile_timestamp_seconds', help: 'When the last round ended (Unix time)', registers: [this.registry]});
	readonly #lag = new Gauge({name: 'sidestep_reconcile_lag_seconds', help: 'From the last change of the pods file to the end of the round that carried it out', registers: [this.registry]});
	readonly #pods = new Gauge({name: 'sidestep_pods', help: 'Pods in the pods file, by state', labelNames: ['state'], registers: [this.registry]});

	constructor(datapath: Datapath) {
		const {registry} = this;
		const {schema, maps, rawMaps, programs} = datapath;
		new Gauge({name: 'sidestep_build_info', help: 'Always 1', labelNames: ['version', 'layout'], registers: [registry]})
			.set({version: packageVersion(), layout: `v${schema.layoutVersion}`}, 1);

		for (const [prefix, name, help] of FAMILIES) {
			const hasReason = prefix.endsWith('_');
			new Counter({
				name, help, labelNames: hasReason ? ['pod', 'reason'] : ['pod'], registers: [registry],
				collect() {
					this.reset();
					const names = new Map(maps.podInfo.entries().map(([cookie, info]) => [cookie, info.name]));
					for (const [cookie, perCpu] of maps.counters.entriesPerCpu()) {
						const pod = names.get(cookie);
						for (const [reason, count] of pod === undefined ? [] : sumCounters(schema, perCpu)) {
							if (reason.startsWith(prefix)) {
								this.inc(hasReason ? {pod: pod!, reason: reason.slice(prefix.length)} : {pod: pod!}, Number(count));
							}
						}
					}
				},
			});
		}

		new Gauge({
			name: 'sidestep_map_entries', help: 'Entries in a map', labelNames: ['map'], registers: [registry],
			collect() {
				for (const [map, raw] of rawMaps) {
					// Socket storage has no entries that could be walked.
					if (map !== 'original_dsts') {
						this.set({map}, raw.count());
					}
				}
			},
		});
		const capacity = new Gauge({name: 'sidestep_map_capacity', help: 'Entries that a map has room for', labelNames: ['map'], registers: [registry]});
		for (const [map, raw] of rawMaps) {
			if (map !== 'original_dsts') {
				capacity.set({map}, raw.info().maxEntries);
			}
		}

		new Counter({
			name: 'sidestep_program_runs_total', help: 'Runs of a BPF program; counted while sysctl kernel.bpf_stats_enabled is 1', labelNames: ['program'], registers: [registry],
			collect() {
				this.reset();
				for (const [program, handle] of programs) {
					this.inc({program}, Number(handle.info().runCount));
				}
			},
		});
		new Counter({
			name: 'sidestep_program_run_seconds_total', help: 'Time spent in a BPF program; counted while sysctl kernel.bpf_stats_enabled is 1', labelNames: ['program'], registers: [registry],
			collect() {
				this.reset();
				for (const [program, handle] of programs) {
					this.inc({program}, Number(handle.info().runTimeNs) / 1e9);
				}
			},
		});
	}

	/** @param lagMs - since the change that asked for the round; undefined for a periodic one. */
	recordRound(round: Round, durationMs: number, lagMs: number | undefined): void {
		this.#rounds.inc({result: round.failures.size === 0 ? 'ok' : 'error'});
		this.#errors.inc({kind: 'pod'}, round.failures.size);
		this.#duration.set(durationMs / 1000);
		this.#last.setToCurrentTime();
		if (lagMs !== undefined) {
			this.#lag.set(lagMs / 1000);
		}

		this.#pods.set({state: 'enrolled'}, round.enrolled.length);
		this.#pods.set({state: 'failed'}, round.failures.size);
	}

	recordError(kind: 'pods_file' | 'round'): void {
		this.#errors.inc({kind});
	}
}
