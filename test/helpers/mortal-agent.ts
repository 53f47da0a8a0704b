/**
The agent of a cluster inside of the test's own process, wired as src/agent.ts and src/node/kubernetes.ts do it, that can die between any two changes of the kernel: whatever it does
after that has no effect, as with a process that was killed. What it had is dropped, and what it pinned stays. ztunnel is not part of it: every workload is acknowledged.
*/
import {performance} from 'node:perf_hooks';
import type {CniHandler} from '../../src/cni/server.js';
import {reasonOf} from '../../src/errors.js';
import {KubernetesClient} from '../../src/kubernetes/client.js';
import {load, type Datapath} from '../../src/loader/datapath.js';
import {takeWriterLock, type WriterLock} from '../../src/loader/lock.js';
import {openObject} from '../../src/loader/object.js';
import {PinLayout} from '../../src/loader/paths.js';
import {native, type NetNs} from '../../src/native.js';
import {cniHandler} from '../../src/node/calls.js';
import {Locator} from '../../src/node/locator.js';
import {NodePods} from '../../src/node/pods.js';
import {ControlLoop} from '../../src/pods/loop.js';
import {Reconciler, type Round} from '../../src/pods/reconcile.js';
import {ISTIO_DEFAULTS} from '../../src/redirect/annotations.js';
import type {ZdsServer} from '../../src/zds/server.js';

/** The time that the agent goes by: the real one, and what the test jumps over. */
export class Clock {
	readonly #real = performance.now.bind(performance);
	#jumped = 0;

	/** @param t - puts the real time back. */
	constructor(t: {teardown(clean: () => void): void}) {
		performance.now = () => this.#real() + this.#jumped;
		t.teardown(() => {
			performance.now = this.#real;
		});
	}

	get realMs(): number {
		return this.#real();
	}

	jump(ms: number): void {
		this.#jumped += ms;
	}
}

class Killed extends Error {}

/** Everything that changes the kernel goes through here. */
class Gate {
	isShut = false;
	/** Changes until the end. */
	left: number | undefined;

	pass(): void {
		if (this.left !== undefined && --this.left < 0) {
			this.isShut = true;
		}

		if (this.isShut) {
			throw new Killed('the agent is dead');
		}
	}
}

/** What an agent changes in a pod's namespace. */
const CHANGES: ReadonlySet<string | symbol> = new Set<keyof NetNs>(['changeRule', 'changeLocalRoute', 'changeAddress', 'setSysctl']);

export interface MortalAgentOptions {
	readonly bpffs: string;
	readonly cgroup: string;
	readonly proc: string;
	readonly server: string;
	readonly node: string;
	readonly excludeNamespaces: readonly string[];
	readonly resyncMs: number;
	readonly log: (line: string) => void;
}

/** Of all agents, one after the other. */
let rounds = 0;

export class MortalAgent {
	readonly handler: CniHandler;
	readonly pods: NodePods;
	/** The number of the last round that looked at a pod, by name. */
	readonly looked = new Map<string, number>();
	failures: ReadonlyMap<string, Error> = new Map();
	readonly #lock: WriterLock;
	readonly #datapath: Datapath;
	readonly #client: KubernetesClient;
	readonly #loop: ControlLoop;
	readonly #gate = new Gate();
	readonly #end = new AbortController();
	readonly #woken = new Set<string>();
	readonly #openNetns = native.openNetns;

	constructor(readonly options: MortalAgentOptions) {
		const {bpffs, cgroup, proc, server, node, excludeNamespaces, resyncMs, log} = options;
		const opened = openObject();
		opened.object.close();
		this.#lock = takeWriterLock(new PinLayout(bpffs, opened.schema.layoutVersion));
		this.#datapath = load(this.#lock, {cgroup}).datapath;
		this.#guard();
		const reconciler: Reconciler = new Reconciler(this.#datapath, {proc, resetOlder: false});
		this.#client = new KubernetesClient({server, log, timing: {gapMs: 4, maxBackoffMs: 30}});
		this.pods = new NodePods({
			client: this.#client, node, log,
			defaults: ISTIO_DEFAULTS,
			excludeNamespaces: new Set(excludeNamespaces),
			locator: new Locator(proc, name => reconciler.formerOf(name)),
			timing: {steadyMs: 20, pageSize: 10},
		});
		this.#loop = new ControlLoop(reconciler, {
			specs: () => this.pods.specs,
			resyncMs,
			onRound: round => {
				this.#onRound(round);
			},
			onError: error => {
				log(`round failed: ${reasonOf(error)}`);
			},
		});
		this.handler = cniHandler({
			pods: this.pods,
			zds: {settled: async () => ({kind: 'acknowledged'})} as unknown as ZdsServer,
			look: name => this.#loop.isSettled ? this.#loop.look(name) : undefined,
			namespaceOf: name => reconciler.namespaceOf(name),
		});
		void this.#run();
	}

	static get rounds(): number {
		return rounds;
	}

	get signal(): AbortSignal {
		return this.#end.signal;
	}

	get isDead(): boolean {
		return this.#gate.isShut;
	}

	/** It has looked at every pod that it was told of since it last heard of it, and at all of them once. */
	get isIdle(): boolean {
		return this.#loop.isSettled && this.#woken.size === 0;
	}

	/** It answers the CNI plugin. */
	get isServing(): boolean {
		return this.#loop.isSettled && this.pods.isSynced;
	}

	/** Dies after so many more changes of the kernel; undefined: not by itself. */
	dieAfter(changes: number | undefined): void {
		this.#gate.left = changes;
	}

	/** As if its process were killed now. */
	kill(): void {
		this.#gate.isShut = true;
		this.#end.abort();
		this.#client.close();
		native.openNetns = this.#openNetns;
		this.#datapath.close();
		this.#lock.release();
	}

	/** Looks at the clock. */
	wake(): void {
		this.#loop.wake([]);
	}

	async #run(): Promise<void> {
		await new Promise<void>(resolve => {
			void this.pods.run({
				onChange: names => {
					for (const name of names) {
						this.#woken.add(name);
					}

					resolve();
					this.#loop.wake(names);
				},
				onReport() {},
			}, this.signal);
		});
		await this.#loop.run(this.signal);
	}

	#onRound({looked, failures}: Round): void {
		rounds++;
		this.failures = failures;
		for (const name of looked) {
			this.#woken.delete(name);
			this.looked.set(name, rounds);
		}
	}

	#guard(): void {
		const gate = this.#gate;
		const {maps} = this.#datapath;
		for (const map of [maps.pods, maps.podInfo, maps.counters, maps.traffic, maps.prefixes, maps.ports, maps.exemptions, maps.addresses] as ReadonlyArray<{set(key: unknown, value: unknown): void; delete(key: unknown): boolean}>) {
			const set = map.set.bind(map);
			const remove = map.delete.bind(map);
			map.set = (key, value) => {
				gate.pass();
				set(key, value);
			};

			map.delete = key => {
				gate.pass();
				return remove(key);
			};
		}

		const datapath = this.#datapath;
		const steer = datapath.steer.bind(datapath);
		const unsteer = datapath.unsteer.bind(datapath);
		datapath.steer = (cookie, netns) => {
			gate.pass();
			steer(cookie, netns);
		};

		datapath.unsteer = cookie => {
			gate.pass();
			if (gate.left === 0) {
				// Between the two things that it does.
				const link = native.openPinnedLink(datapath.layout.podLink(cookie));
				link.detach();
				link.close();
			}

			gate.pass();
			unsteer(cookie);
		};

		const open = this.#openNetns;
		native.openNetns = path => {
			const netns = open(path);
			return gate.left === undefined && !gate.isShut ? netns : new Proxy(netns, {
				get(target, key) {
					const value: unknown = Reflect.get(target, key, target);
					return typeof value !== 'function' ? value : (...args: readonly unknown[]) => {
						if (CHANGES.has(key)) {
							gate.pass();
						}

						return Reflect.apply(value, target, args) as unknown;
					};
				},
			});
		};
	}
}
