/**
What the agent tells Prometheus. Everything of the datapath is read from the kernel at scrape time.
*/
import {Counter, Gauge, Histogram, Registry} from 'prom-client';
import type {Datapath} from '../loader/datapath.js';
import {packageVersion} from '../loader/object.js';
import {UNWALKABLE, sumCounters, sumTraffic} from '../maps/schema.js';
import type {Round} from '../pods/reconcile.js';

/** The families that reasons are told apart by: how a reason begins; where there are several, the label that the rest of it goes to. */
const FAMILIES: ReadonlyArray<readonly [prefix: string, name: string, help: string, label?: string]> = [
	['redirected', 'sidestep_redirects_total', 'Connections (DNS over UDP without a connection: datagrams) sent to the proxy, by which of its ports', 'to'],
	['bypass_', 'sidestep_bypasses_total', 'Connections left alone, by the rule that said so', 'reason'],
	['refused_', 'sidestep_refusals_total', 'Connections refused because they could not be captured', 'reason'],
	['accepted', 'sidestep_accepts_total', 'Redirected connections that reached the proxy with their original destination'],
	['connect_failed', 'sidestep_connect_failures_total', 'Redirected connections that the proxy did not answer'],
	['original_dst_lost', 'sidestep_original_dst_lost_total', 'Redirected connections whose original destination could not be carried to the proxy'],
	['steered', 'sidestep_steers_total', 'Inbound SYNs given to the proxy\'s listener'],
	['inbound_bypass_', 'sidestep_inbound_bypasses_total', 'Inbound SYNs left alone, by the rule that said so', 'reason'],
	['inbound_refused', 'sidestep_inbound_refusals_total', 'Inbound SYNs refused because the proxy did not listen'],
	['pass_lost', 'sidestep_passes_lost_total', 'Connections into the pod that the map passes had no room for'],
	['listener_lost', 'sidestep_listeners_lost_total', 'Listeners of the proxy that the map listeners had no room for'],
	['listener_unsteerable', 'sidestep_listeners_unsteerable_total', 'Listeners of the proxy that connections cannot be given to (MPTCP)'],
	['source_kept', 'sidestep_sources_kept_total', 'Connections that the proxy made to the pod under a client\'s address'],
	['accelerated', 'sidestep_accelerated_pairs_total', 'Chatty local connections whose bytes go past the TCP stack from then on'],
	['unaccelerated_', 'sidestep_unaccelerated_pairs_total', 'Chatty local connections that stay on TCP, by why', 'reason'],
	['source_port_left', 'sidestep_source_ports_left_total', 'Sockets of those whose port was left to the kernel because none was known to be free'],
];

export class Metrics {
	readonly registry = new Registry();
	readonly #rounds = new Counter({name: 'sidestep_reconciles_total', help: 'Rounds of the control loop, by result', labelNames: ['result'], registers: [this.registry]});
	readonly #errors = new Counter({name: 'sidestep_reconcile_errors_total', help: 'Errors of the control loop, by what they concern', labelNames: ['kind'], registers: [this.registry]});
	readonly #duration = new Gauge({name: 'sidestep_reconcile_duration_seconds', help: 'How long the last round took', registers: [this.registry]});
	readonly #last = new Gauge({name: 'sidestep_reconcile_timestamp_seconds', help: 'When the last round ended (Unix time)', registers: [this.registry]});
	readonly #lag = new Histogram({name: 'sidestep_reconcile_lag_seconds', help: 'From hearing of a change to the end of the round that carried it out', buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5], registers: [this.registry]});
	readonly #counted = new WeakSet<Error>();
	readonly #pods = new Gauge({name: 'sidestep_pods', help: 'Pods there should be, by state', labelNames: ['state'], registers: [this.registry]});

	constructor(datapath: Datapath) {
		for (const kind of ['pod', 'round', 'pods_file']) {
			this.#errors.inc({kind}, 0);
		}

		const {registry} = this;
		const {schema, maps, rawMaps, programs} = datapath;
		new Gauge({name: 'sidestep_build_info', help: 'Always 1', labelNames: ['version', 'layout'], registers: [registry]})
			.set({version: packageVersion(), layout: `v${schema.layoutVersion}`}, 1);

		for (const [prefix, name, help, label] of FAMILIES) {
			new Counter({
				name, help, labelNames: label ? ['pod', label] : ['pod'], registers: [registry],
				collect() {
					this.reset();
					const names = new Map(maps.podInfo.entries().map(([cookie, info]) => [cookie, info.name]));
					for (const [cookie, perCpu] of maps.counters.entriesPerCpu()) {
						const pod = names.get(cookie);
						for (const [reason, count] of pod === undefined ? [] : sumCounters(schema, perCpu)) {
							if (reason.startsWith(prefix)) {
								this.inc(label ? {pod: pod!, [label]: reason.slice(prefix.length).replace(/^_/, '') || 'outbound'} : {pod: pod!}, Number(count));
							}
						}
					}
				},
			});
		}

		for (const [unit, help] of [['bytes', 'Bytes'], ['messages', 'Messages']] as const) {
			new Counter({
				name: `sidestep_acceleration_${unit}_total`, help: `${help} of accelerated pairs, by which end sent them: redirected, or by TCP for a reason`,
				labelNames: ['pod', 'sender', 'way'], registers: [registry],
				collect() {
					this.reset();
					const names = new Map(maps.podInfo.entries().map(([cookie, info]) => [cookie, info.name]));
					for (const [cookie, perCpu] of maps.traffic.entriesPerCpu()) {
						const pod = names.get(cookie);
						const {sentByClient, sentByServer} = sumTraffic(schema, perCpu);
						for (const [sender, {redirected, passed}] of pod === undefined ? [] : [['client', sentByClient], ['server', sentByServer]] as const) {
							for (const [way, volume] of Object.entries({redirected, ...passed})) {
								this.inc({pod: pod!, sender, way}, Number(volume[unit]));
							}
						}
					}
				},
			});
		}

		new Counter({
			name: 'sidestep_unknown_address_refusals_total', help: 'Inbound SYNs refused because they came to an address that no pod is known by', registers: [registry],
			collect() {
				this.reset();
				this.inc(Number(maps.node.get(0)?.unknownAddresses ?? 0n));
			},
		});
		new Gauge({
			name: 'sidestep_map_entries', help: 'Entries in a map', labelNames: ['map'], registers: [registry],
			collect() {
				for (const [map, raw] of rawMaps) {
					if (!UNWALKABLE.includes(map)) {
						this.set({map}, raw.count());
					}
				}
			},
		});
		const capacity = new Gauge({name: 'sidestep_map_capacity', help: 'Entries that a map has room for', labelNames: ['map'], registers: [registry]});
		for (const [map, raw] of rawMaps) {
			if (!UNWALKABLE.includes(map)) {
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
		for (const error of round.failures.values()) {
			// It stays the same one until the pod is looked at again.
			if (!this.#counted.has(error)) {
				this.#counted.add(error);
				this.#errors.inc({kind: 'pod'});
			}
		}

		this.#duration.set(durationMs / 1000);
		this.#last.setToCurrentTime();
		if (lagMs !== undefined) {
			this.#lag.observe(lagMs / 1000);
		}

		this.#pods.set({state: 'enrolled'}, round.enrolled.length);
		this.#pods.set({state: 'failed'}, round.failures.size);
	}

	recordError(kind: 'pods_file' | 'round'): void {
		this.#errors.inc({kind});
	}
}
