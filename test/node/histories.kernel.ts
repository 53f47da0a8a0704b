/**
Random histories of pods, many at once, under an agent that dies between any two changes: after every step the kernel holds what the contract says of each pod (model.ts).
SIDESTEP_SEED and SIDESTEP_HISTORIES repeat a run, as far as the time that things take allows.
*/
import {setImmediate as nextTurn} from 'node:timers/promises';
import {isDeepStrictEqual} from 'node:util';
import test from 'ava';
import {reasonOf} from '../../src/errors.js';
import {readNamespace, readPod} from '../../src/kubernetes/objects.js';
import {openDatapath, type Datapath} from '../../src/loader/datapath.js';
import {POD_INBOUND, PORT_OUTBOUND_EXCLUDED, PREFIX_LOCAL} from '../../src/maps/schema.js';
import {native} from '../../src/native.js';
import {FakeApiServer, makeNamespace, makePod} from '../kubernetes/fake-server.js';
import {NODE} from '../helpers/cluster.js';
import {randomOf} from '../helpers/contract.js';
import {FakeHost, type Space} from '../helpers/fake-host.js';
import {Clock, MortalAgent} from '../helpers/mortal-agent.js';
import {World} from '../helpers/world.js';
import {describe, readAddresses, readHeld, unique, type Held} from './held.js';
import {Draw, History, type Labels, type Sandbox} from './history.js';
import {
	AMBIENT_LABEL, BYPASS, DNS, EXCLUDED, EXCLUDE_PORTS, INBOUND_PORTS, SIDECAR, STATIC_HASH, ZTUNNELS, lookAt, settingsOf, wantedOf, type Entry, type Facts, type PodFacts,
} from './model.js';
import {Runtime} from './runtime.js';

const HISTORIES = Number(process.env['SIDESTEP_HISTORIES'] ?? 5000);
/** At a time. */
const LIVE = 40;
const SPACES = 160;
const NAMESPACES = ['shop', 'bank', 'mail', 'game', EXCLUDED, ZTUNNELS];
const RESYNC_MS = 1000;
/** Longer than the agent believes in a list of processes, and than it waits before it tries again. */
const JUMP_MS = 1100;
const TOUR_STEP_MS = 60;
const PATIENCE_MS = 60_000;

interface Step {
	readonly name: string;
	readonly weight: number;
	readonly can: (history: History) => boolean;
	/** @returns what happened. */
	readonly run: (history: History) => string;
}

class Play {
	readonly draw: Draw;
	readonly live: History[] = [];
	readonly counts = new Map<string, number>();
	readonly lines: string[] = [];
	agent: MortalAgent | undefined;
	ticks = 0;
	started = 0;
	readonly #labels = new Map<string, Labels>();
	#heardLabels: ReadonlyMap<string, Labels> | undefined;
	#missedLabels: Array<ReadonlyMap<string, Labels>> = [];
	#awayFor = 0;
	/** While it is away: it answers what is asked for one by one, and tells nothing. */
	#isSilent = false;
	#downFor = 0;
	/** An agent died in the middle of a round, and none has looked at everything since. */
	#isTorn = false;
	#isDeadly = false;
	#held = '';
	readonly #calls = new Set<Promise<void>>();
	readonly #runtime: Runtime;
	readonly #datapath: Datapath;

	constructor(readonly seed: number, readonly world: World, readonly host: FakeHost, readonly api: FakeApiServer, readonly clock: Clock) {
		this.draw = new Draw(randomOf(seed));
		this.#runtime = new Runtime(host);
		for (const name of NAMESPACES) {
			this.#label(name, this.draw.chance(0.6) ? {[AMBIENT_LABEL]: 'ambient'} : {});
		}

		this.#startAgent();
		this.#datapath = openDatapath(world.bpffs);
		this.#held = this.#read().text;
	}

	async close(): Promise<void> {
		this.agent?.kill();
		this.#datapath.close();
		if (!this.#isHearing && !this.#isSilent) {
			await this.api.listen();
		}
	}

	/** Pods that got addresses that were another's a moment ago. */
	get borrowed(): number {
		return this.#runtime.borrowed;
	}

	async run(): Promise<void> {
		await this.#settle(true);
		while (this.started < HISTORIES || this.live.length > 0) {
			while (this.live.length < LIVE && this.started < HISTORIES) {
				this.#begin();
			}

			await this.#tick();
		}
	}

	#begin(): void {
		const index = this.started++;
		const slot = Array.from({length: LIVE}, (_, number) => number).find(number => !this.live.some(({name}) => name.endsWith(`/p${number}`)))!;
		const draw = new Draw(randomOf(this.seed + index));
		const namespace = draw.weighed([[6, 'shop'], [6, 'bank'], [6, 'mail'], [6, 'game'], [1, EXCLUDED], [1, ZTUNNELS]] as const);
		this.live.push(new History(index, `${namespace}/p${slot}`, this.seed));
	}

	async #tick(): Promise<void> {
		this.ticks++;
		const {draw} = this;
		let mustTour = draw.chance(0.05);
		if (draw.chance(0.25)) {
			mustTour = await this.#happen() || mustTour;
		} else {
			if (this.agent && draw.chance(0.2)) {
				this.agent.dieAfter(draw.below(30));
				this.#isDeadly = true;
				this.#count('deadly tick');
			}

			for (const history of [...this.live]) {
				this.#step(history);
				if (draw.chance(0.2)) {
					await nextTurn();
				}
			}
		}

		await this.#settle(mustTour);
		this.#compare();
		this.#tidy();
	}

	// What happens to all.

	/** @returns whether the agent hears nothing of it. */
	async #happen(): Promise<boolean> {
		const {draw, api} = this;
		const isUp = this.#awayFor === 0;
		const what = draw.weighed<() => Promise<boolean> | boolean>([
			[5, () => {
				const name = draw.one(NAMESPACES);
				const labels: Labels | undefined = draw.weighed([[4, {[AMBIENT_LABEL]: 'ambient'}], [2, {}], [1, {[AMBIENT_LABEL]: 'none'}], [1, undefined]]);
				this.#note(labels ? `namespace ${name} is labelled ${JSON.stringify(labels)}` : `namespace ${name} is deleted`);
				this.#label(name, labels);
				return false;
			}],
			[2, () => {
				this.#note('watches end');
				api.endWatches();
				return false;
			}],
			[2, () => {
				this.#note('changes are forgotten, connections reset');
				api.compact();
				api.resetConnections();
				return false;
			}],
			[isUp ? 4 : 0, async () => {
				this.#note('the API server goes away');
				this.#hide();
				await api.stop();
				return false;
			}],
			[isUp ? 3 : 0, () => {
				this.#note('watches and lists fail');
				this.#hide();
				this.#isSilent = true;
				api.behave({status: 500, applies: ({path}) => path === '/api/v1/pods' || path === '/api/v1/namespaces'});
				api.endWatches();
				return false;
			}],
			[this.agent ? 6 : 0, () => {
				this.#note('the agent dies');
				this.#bury(false);
				this.#downFor = draw.chance(0.6) ? 0 : 1 + draw.below(3);
				return false;
			}],
			[this.agent?.isIdle && this.agent.pods.specs.size > 0 ? 6 : 0, async () => this.#tamper()],
		]);
		return what();
	}

	/** From now on the agent hears of nothing. */
	#hide(): void {
		this.#awayFor = 1 + this.draw.below(5);
		this.#heardLabels = new Map(this.#labels);
		this.#missedLabels = [this.#heardLabels];
		for (const history of this.live) {
			history.heard = history.pod;
			history.missed.push(history.pod);
		}
	}

	#label(name: string, labels: Labels | undefined): void {
		if (labels) {
			this.#labels.set(name, labels);
			this.api.put('namespaces', makeNamespace(name, {...labels}));
		} else {
			this.#labels.delete(name);
			this.api.delete('namespaces', name);
		}

		this.#missedLabels.push(new Map(this.#labels));
	}

	/** Somebody else writes to the maps, or takes a pin away. */
	async #tamper(): Promise<boolean> {
		for (let count = 1 + this.draw.below(4); count > 0; count--) {
			this.#tamperOnce();
		}

		// To the end of the tour that is under way: maps are read at the beginning of one.
		await this.#lookAgain(new Set(this.agent!.pods.specs.keys()), TOUR_STEP_MS, true);
		return true;
	}

	#tamperOnce(): void {
		const {draw} = this;
		const {maps, rawMaps, layout} = this.#datapath;
		const victims = this.live.flatMap(history => {
			const [entry] = history.possible;
			return history.possible.length === 1 && entry && lookAt(this.#facts(history), undefined, this.host)?.space === entry.space ? [entry] : [];
		});
		const junk = 2n ** 50n + BigInt(draw.below(1000));
		const victim = victims.length > 0 ? draw.one(victims) : undefined;
		const cookie = victim?.space.cookie ?? junk;
		const pod = maps.pods.get(cookie);
		const kinds: ReadonlyArray<readonly [string, () => void]> = [
			['delete a pod', () => maps.pods.delete(cookie)],
			['delete what is written about a pod', () => {
				if (victim && maps.podInfo.delete(cookie)) {
					this.#runtime.unrecorded.add(victim.space);
				}
			}],
			['delete counters', () => maps.counters.delete(cookie)],
			['delete measures', () => maps.traffic.delete(cookie)],
			['delete a pod\'s lists', () => {
				for (const [key] of maps.prefixes.entries().filter(([{policy}]) => policy === pod?.policy)) {
					maps.prefixes.delete(key);
				}
			}],
			['delete an address', () => {
				for (const [key] of maps.addresses.entries().filter(([, owner]) => owner === cookie).slice(0, 1)) {
					maps.addresses.delete(key);
				}
			}],
			['give a pod\'s address to another', () => {
				for (const [key] of maps.addresses.entries().filter(([, owner]) => owner === cookie).slice(0, 1)) {
					maps.addresses.set(key, junk);
				}
			}],
			['add an address of nobody', () => maps.addresses.set({address: '10.99.0.1', bits: 128}, junk)],
			['add list entries of nobody', () => {
				maps.prefixes.set({policy: 4_000_000, bits: 32 + 128, address: '10.99.0.2'}, {flags: PREFIX_LOCAL});
				maps.ports.set({policy: 4_000_001, port: 80}, {flags: PORT_OUTBOUND_EXCLUDED});
				maps.exemptions.set({policy: 4_000_002, kind: 'EXEMPT_UID', id: 7n}, {present: 1});
			}],
			['add to a pod\'s lists', () => {
				if (pod) {
					maps.ports.set({policy: pod.policy, port: 12_345}, {flags: PORT_OUTBOUND_EXCLUDED});
				}
			}],
			['add a pod of nobody', () => {
				if (pod) {
					maps.pods.set(junk, {...pod, policy: 4_000_003});
				}
			}],
			['change a pod', () => {
				if (pod) {
					maps.pods.set(cookie, {...pod, flags: 0, dnsPort: 1});
				}
			}],
			['take a pod\'s link away', () => {
				if (pod && pod.flags & POD_INBOUND) {
					const link = native.openPinnedLink(layout.podLink(cookie));
					link.detach();
					link.close();
				}
			}],
			// Of a pod that cannot be looked at, nobody knows what to write again.
			['empty a map', () => {
				if (victims.length < this.live.filter(({possible}) => possible.some(Boolean)).length) {
					return;
				}

				const map = rawMaps.get(draw.one(['prefixes', 'ports', 'addresses', 'counters'] as const))!;
				for (let key = map.nextKey(); key; key = map.nextKey()) {
					map.delete(key);
				}
			}],
		];
		const [name, act] = draw.one(kinds);
		this.#note(`somebody writes: ${name}`);
		act();
	}

	// The agent.

	#startAgent(): void {
		this.agent = new MortalAgent({
			bpffs: this.world.bpffs, cgroup: this.world.cgroup, proc: this.host.proc, server: this.api.url, node: NODE, excludeNamespaces: [EXCLUDED], resyncMs: RESYNC_MS,
			log: line => {
				this.lines.push(line);
			},
		});
		this.#count('agents');
	}

	/** It is dead, and what it knew is gone with it. */
	#bury(isTorn: boolean): void {
		for (const history of this.live) {
			// It may have looked at the pod before.
			history.possible = this.#either(history);
			history.told = undefined;
			history.called = undefined;
			history.seen = undefined;
			for (const {space} of isTorn ? history.sandboxes : []) {
				this.#runtime.used.add(space);
			}
		}

		this.#isTorn ||= isTorn;
		this.agent!.kill();
		this.agent = undefined;
	}

	get #isHearing(): boolean {
		return this.#awayFor === 0;
	}

	#facts(history: History): Facts {
		const labels = this.#isHearing ? this.#labels : this.#heardLabels!;
		const {heard, called} = history;
		const pod = this.#isHearing ? history.pod : called && heard?.uid === called.formerUid ? called.pod : heard;
		return {name: history.name, pod, namespaceLabels: labels.get(history.namespace), told: history.told};
	}

	#looked(history: History): ReadonlyArray<Entry | undefined> {
		const facts = this.#facts(history);
		const pods = this.#isHearing && history.called ? [facts.pod, history.called.pod] : [facts.pod];
		// Whether the agent has remembered where it once saw a pod that has no process now is its own affair.
		const memories = history.seen?.uid === facts.pod?.uid ? [undefined, history.seen?.space] : [undefined];
		return unique(history.possible.flatMap(before => pods.flatMap(pod => memories.map(seen => lookAt({...facts, pod}, before, this.host, seen)))));
	}

	#either(history: History): ReadonlyArray<Entry | undefined> {
		return unique([...history.possible, ...this.#looked(history)]);
	}

	/** Until nothing is left to do for the agent. */
	async #settle(mustTour: boolean): Promise<void> {
		if (this.#awayFor > 0 && --this.#awayFor === 0) {
			this.#catchUp();
			if (this.#isSilent) {
				this.#isSilent = false;
				this.api.behave();
			} else {
				await this.api.listen();
			}

			this.#note('the API server is back');
		}

		this.clock.jump(JUMP_MS);
		await this.#quiet();
		await Promise.all(this.#calls);
		if (this.failure) {
			throw this.failure;
		}

		if (this.agent?.isDead) {
			this.#note('the agent dies in the middle of a round');
			this.#bury(true);
			this.#downFor = this.draw.chance(0.5) ? 0 : 1 + this.draw.below(3);
		}

		this.agent?.dieAfter(undefined);
		this.#isDeadly = false;
		if (!this.agent && this.#downFor-- <= 0) {
			this.#startAgent();
		}

		await this.#quiet();
		await this.#lookAgain(new Set(this.agent?.failures.keys()), JUMP_MS);
		if (mustTour && this.agent?.pods.isSynced) {
			this.#count('tours');
			await this.#lookAgain(new Set(this.agent.pods.specs.keys()), TOUR_STEP_MS, true);
		}
	}

	/** All that was changed while the server was away comes in one after the other, or at once, and namespaces before pods or after them. */
	#catchUp(): void {
		for (const history of this.live) {
			const facts = {name: history.name, told: history.told};
			// One that was called and is gone without a DEL is believed in for a while.
			history.called = history.pod || history.told === undefined ? undefined : history.called;
			for (const pod of history.missed.splice(0)) {
				for (const labels of this.#missedLabels) {
					history.possible = unique([...history.possible, ...history.possible.map(before => lookAt({...facts, pod, namespaceLabels: labels.get(history.namespace)}, before, this.host))]);
				}
			}
		}
	}

	/** The agent has heard of everything, and looked at what it heard of. */
	async #quiet(): Promise<void> {
		const {agent, api} = this;
		if (!agent) {
			return;
		}

		const pods = new Map(api.list('pods').map(object => readPod(object)!).map(pod => [`${pod.namespace}/${pod.name}`, pod]));
		const namespaces = new Map(api.list('namespaces').map(object => readNamespace(object)!).map(namespace => [namespace.name, namespace]));
		const {reflectors} = agent.pods;
		let calm = 0;
		await this.#until('the agent is idle', () => {
			const hasHeard = () => !this.#isHearing || (agent.pods.isSynced && isDeepStrictEqual(reflectors.pods.items, pods) && isDeepStrictEqual(reflectors.namespaces.items, namespaces));
			// What is told in one turn of the event loop is in the specs in the next, and looked at in one after that.
			calm = agent.isDead || ((agent.isIdle || !agent.pods.isSynced) && (calm > 0 || hasHeard())) ? calm + 1 : 0;
			return calm > 3;
		});
	}

	/** Goes on in time until these pods were looked at. */
	async #lookAgain(names: ReadonlySet<string>, stepMs: number, isWhole = false): Promise<void> {
		const {agent} = this;
		if (!agent || names.size === 0) {
			return;
		}

		const from = MortalAgent.rounds;
		let mustJump = true;
		await this.#until(`${isWhole ? 'every' : 'each failing'} pod was looked at`, () => {
			if (mustJump) {
				this.clock.jump(stepMs);
				agent.wake();
			}

			mustJump = !mustJump;
			return [...names].every(name => (agent.looked.get(name) ?? 0) > from || !agent.pods.specs.has(name));
		});
		await this.#until('it is idle', () => agent.isIdle);
	}

	async #until(what: string, test: () => boolean): Promise<void> {
		const deadline = this.clock.realMs + PATIENCE_MS;
		while (!test()) {
			if (this.clock.realMs > deadline) {
				throw new Error(`did not happen: ${what}; ${this.#context()}`);
			}

			await nextTurn();
		}
	}

	// What happens to one pod.

	#step(history: History): void {
		if (history.isBusy || history.isOver) {
			return;
		}

		for (const process of history.inner) {
			this.host.end(process);
			history.inner.delete(process);
			this.#runtime.retire(process.space!);
		}

		const steps = history.stepsLeft-- > 0 ? this.#steps : this.#lastSteps;
		const possible = steps.filter(({can}) => can(history));
		const step = history.draw.weighed(possible.map(step => [step.weight, step] as const));
		const said = step.run(history);
		this.#count(step.name);
		history.log.push(`tick ${this.ticks}: ${said}`);
	}

	#set(history: History, pod: PodFacts | undefined): void {
		history.pod = pod;
		if (!this.#isHearing) {
			history.missed.push(pod);
		}
	}

	/** Changes the pod's object. */
	#put(history: History, pod: PodFacts): void {
		this.#set(history, pod);
		const {uid, labels, annotations, hostNetwork, phase, ips, deletionTimestamp} = pod;
		this.api.put('pods', makePod(history.name, {
			uid, labels: {...labels}, annotations: {...annotations}, hostNetwork, phase, ips, nodeName: NODE, ...(deletionTimestamp === undefined ? {} : {deletionTimestamp}),
		}));
	}

	#change(history: History, change: Partial<PodFacts>): string {
		this.#put(history, {...history.pod!, ...change});
		return JSON.stringify(change);
	}

	#drawPod({draw}: History): PodFacts {
		const hash = draw.chance(0.06) ? {[STATIC_HASH]: draw.uuid().replaceAll('-', '')} : {};
		return {
			uid: draw.uuid(), phase: 'Pending', ips: [], hostNetwork: draw.chance(0.04),
			labels: {...draw.weighed<Labels>([[5, {}], [5, {[AMBIENT_LABEL]: 'ambient'}], [1, {[AMBIENT_LABEL]: 'none'}]]), ...(draw.chance(0.03) ? {app: 'ztunnel'} : {})},
			annotations: {...hash, ...(draw.chance(0.2) ? {[SIDECAR]: '{}'} : {})},
		};
	}

	#silent(history: History): void {
		history.silentSince = MortalAgent.rounds;
	}

	#cniCall(history: History, {uid, id, file = '', space}: Sandbox) {
		const [podNamespace = '', podName = ''] = history.name.split('/');
		return {netns: file, podName, podNamespace, podUid: uid, containerId: id, ips: [...space.addresses]};
	}

	/** The runtime makes a sandbox, and asks whether it may start. */
	#cniAdd(history: History): string {
		const sandbox = this.#runtime.makeSandbox(history);
		const {space, uid} = sandbox;
		this.#runtime.used.add(space);
		sandbox.file = this.host.nameSpace(space);
		history.isBusy = true;
		this.#silent(history);
		const {agent, host} = this;
		const ips = [...space.addresses];
		const facts = this.#facts(history);
		const heard = this.#isHearing ? history.pod : history.heard;
		const isHeard = heard?.uid === uid;
		const canAsk = this.#isHearing || this.#isSilent;
		// What was heard is enough to capture a pod, and not to leave it alone.
		const isEnough = isHeard && typeof wantedOf(history.name, heard, facts.namespaceLabels) === 'object';
		const truth = isEnough ? heard : canAsk ? history.pod! : undefined;
		const wanted = wantedOf(history.name, truth, isEnough ? facts.namespaceLabels : this.#labels.get(history.namespace));
		const isAnswered = agent !== undefined && agent.isServing && truth !== undefined && facts.namespaceLabels !== undefined;
		const isCapture = typeof wanted === 'object';
		// By this the pod is captured from then on.
		const known = isHeard ? heard : truth;
		const mayStart = isAnswered && (isCapture ? typeof wantedOf(history.name, known, facts.namespaceLabels) === 'object' : wanted === 'nothing');
		const told = {uid, id: sandbox.id, ips, statusIps: known?.ips.join() ?? '', file: sandbox.file, space};
		const call = async () => {
			try {
				if (!agent) {
					throw new Error('nobody listens');
				}

				await agent.handler.add(this.#cniCall(history, sandbox), agent.signal);
			} catch (error) {
				history.isBusy = false;
				history.log.push(`  ADD fails: ${reasonOf(error)}`);
				this.#count('ADD fails');
				if (agent && !agent.isDead && mayStart && !this.#isDeadly) {
					this.#fail(history, `the pod may start, and ADD fails: ${reasonOf(error)}`);
				}

				// What it may have done before it failed.
				if (agent === this.agent && isCapture) {
					history.possible = unique([...history.possible, ...history.possible.map(before => lookAt({...facts, pod: known, told}, before, host))]);
				}

				this.#runtime.endSandbox(history, sandbox);
				await agent?.handler.del(this.#cniCall(history, sandbox)).catch(() => {});
				history.told = undefined;
				return;
			}

			history.isBusy = false;
			this.#count('ADD succeeds');
			if (!mayStart) {
				this.#fail(history, 'the pod may not start, and ADD succeeds');
			}

			if (isCapture) {
				history.possible = unique(history.possible.map(before => lookAt({...facts, pod: known, told}, before, host)));
				history.told = agent.isDead ? undefined : told;
				if (!this.#isHearing && facts.pod?.uid !== uid && !agent.isDead) {
					history.called = {pod: known!, formerUid: history.heard?.uid};
				}

				const {pods, addresses} = this.#datapath.maps;
				const owners = ips.map(address => addresses.get({address, bits: 128}));
				if (!pods.get(space.cookie) || owners.some(owner => owner !== space.cookie)) {
					const others = this.live.filter(({possible}) => possible.some(entry => entry && owners.includes(entry.space.cookie)));
					this.#fail(history, `ADD succeeds, and the pod is not captured at ${ips.join(', ')} in ${space.cookie}: pods has ${pods.get(space.cookie)?.policy}, addresses are of ${owners.join(', ')}`, others);
				}
			}
		};

		const done = call().finally(() => {
			this.#calls.delete(done);
		});
		this.#calls.add(done);
		done.catch(() => {});
		return `CNI ADD of a namespace with ${ips.join(', ')}`;
	}

	#cniDel(history: History, sandbox: Sandbox): void {
		const {agent} = this;
		if (agent) {
			void agent.handler.del(this.#cniCall(history, sandbox)).catch(() => {});
			if (history.told?.id === sandbox.id) {
				history.called = undefined;
				history.told = undefined;
			}
		}
	}

	/** The runtime takes the sandbox down; with its plugin, the agent hears of it. */
	#takeDown(history: History, leave = false): string {
		const sandbox = history.sandbox!;
		const hadFile = sandbox.file !== undefined;
		this.#runtime.endSandbox(history, sandbox, leave && sandbox.processes.size > 0);
		this.#silent(history);
		if (hadFile && history.draw.chance(0.8)) {
			this.#cniDel(history, sandbox);
			history.former = sandbox;
			return `its sandbox ends${leave ? ', but for a process' : ''}, CNI DEL`;
		}

		return `its sandbox ends${leave ? ', but for a process' : ''}`;
	}

	#startSandbox(history: History): string {
		// When the server comes back while it is asked, both answers are right.
		if (history.draw.chance(0.4) && this.#awayFor !== 1) {
			return this.#cniAdd(history);
		}

		const sandbox = this.#runtime.makeSandbox(history);
		this.#runtime.startProcess(history, sandbox);
		this.#silent(history);
		return `a sandbox starts with ${[...sandbox.space.addresses].join(', ')}`;
	}

	readonly #steps: readonly Step[] = [
		{name: 'create', weight: 10, can: ({pod}) => !pod, run: history => {
			this.#leave(history);
			this.#put(history, this.#drawPod(history));
			return `created: ${JSON.stringify(history.pod)}`;
		}},
		{name: 'create, and its sandbox at once', weight: 10, can: ({pod, sandbox}) => !pod && !sandbox, run: history => {
			this.#put(history, this.#drawPod(history));
			return `created: ${JSON.stringify(history.pod)}; ${this.#startSandbox(history)}`;
		}},
		{name: 'a pod that runs', weight: 20, can: ({pod, sandbox}) => !pod && !sandbox, run: history => {
			history.pod = this.#drawPod(history);
			const sandbox = this.#runtime.makeSandbox(history);
			this.#runtime.startProcess(history, sandbox);
			return `runs: ${JSON.stringify(history.pod)}; ${this.#change(history, {phase: 'Running', ips: [...sandbox.space.addresses]})}`;
		}},
		{name: 'sandbox', weight: 25, can: ({pod, sandbox}) => pod !== undefined && !pod.hostNetwork && !sandbox, run: history => this.#startSandbox(history)},
		{name: 'report addresses', weight: 25, can: ({pod, sandbox}) => pod !== undefined && sandbox !== undefined && sandbox.uid === pod.uid && pod.ips.join() !== [...sandbox.space.addresses].join(), run: history => {
			const ips = [...history.sandbox!.space.addresses];
			return this.#change(history, {phase: 'Running', ips: history.draw.chance(0.8) ? ips : ips.slice(0, 1)});
		}},
		{name: 'first process', weight: 20, can: ({sandbox}) => sandbox?.processes.size === 0, run: history => {
			this.#runtime.startProcess(history, history.sandbox!);
			this.#silent(history);
			return 'its first process starts';
		}},
		{name: 'one more process', weight: 2, can: ({sandbox}) => sandbox !== undefined, run: history => {
			this.#runtime.startProcess(history, history.sandbox!);
			this.#silent(history);
			return 'one more process starts';
		}},
		{name: 'restart', weight: 3, can: ({sandbox}) => sandbox !== undefined && sandbox.processes.size > 0, run: history => {
			const sandbox = history.sandbox!;
			const processes = [...sandbox.processes];
			const process = history.draw.one(processes);
			const comesFirst = history.draw.chance(0.5);
			const start = () => this.#runtime.startProcess(history, sandbox);
			if (comesFirst) {
				start();
			}

			this.#runtime.endProcess(sandbox, process);
			if (!comesFirst) {
				start();
			}

			this.#silent(history);
			return `process ${process.pid} ends, another comes`;
		}},
		{name: 'unshare', weight: 2, can: ({sandbox, pod}) => sandbox?.uid === pod?.uid && sandbox !== undefined && sandbox.processes.size > 0, run: history => {
			const {draw, sandbox} = history;
			const isTwin = draw.chance(0.5);
			const space = this.#runtime.takeInner(isTwin ? [...sandbox!.space.addresses] : []);
			// With the pod's address, only what came later is not the pod's.
			history.inner.add(this.host.start(sandbox!.cgroupUid, space, history.form, isTwin ? undefined : draw.below(1000)));
			this.#silent(history);
			return `a process with a namespace of its own${isTwin ? ', and the pod\'s addresses in it' : ', the oldest of all'}`;
		}},
		{name: 'process in the host\'s namespace', weight: 1, can: ({sandbox}) => sandbox !== undefined, run: history => {
			const process = this.host.start(history.sandbox!.cgroupUid, undefined, history.form, history.draw.below(1000));
			history.sandbox!.processes.add(process);
			this.#silent(history);
			return 'a process in the host\'s namespace, the oldest of all';
		}},
		{name: 'second address', weight: 1, can: ({sandbox}) => sandbox !== undefined && sandbox.space.addresses.size === 1 && !this.#runtime.hasBorrowed(sandbox.space), run: history => {
			const {space} = history.sandbox!;
			this.host.setAddresses(space, [...new Set([...space.addresses, ...space.home])]);
			this.#silent(history);
			return `its namespace has ${[...space.addresses].join(', ')} now`;
		}},
		{name: 'label', weight: 4, can: ({pod}) => pod !== undefined, run: history => {
			const {[AMBIENT_LABEL]: _, ...others} = history.pod!.labels;
			return this.#change(history, {labels: {...others, ...history.draw.weighed<Labels>([[3, {}], [3, {[AMBIENT_LABEL]: 'ambient'}], [2, {[AMBIENT_LABEL]: 'none'}], [1, {[AMBIENT_LABEL]: 'other'}]])}});
		}},
		{name: 'sidecar', weight: 2, can: ({pod}) => pod !== undefined, run: history => {
			const {[SIDECAR]: before, ...others} = history.pod!.annotations;
			return this.#change(history, {annotations: {...others, ...(before === undefined ? {[SIDECAR]: '{}'} : {})}});
		}},
		{name: 'annotate', weight: 4, can: ({pod}) => pod !== undefined, run: history => {
			const {draw, pod} = history;
			const {[DNS]: _1, [BYPASS]: _2, [EXCLUDE_PORTS]: _3, [INBOUND_PORTS]: _4, ...others} = pod!.annotations;
			return this.#change(history, {annotations: {...others, ...draw.one<Labels>([
				{}, {[DNS]: 'false'}, {[DNS]: 'perhaps'}, {[BYPASS]: 'true'}, {[BYPASS]: 'yes!'}, {[EXCLUDE_PORTS]: '7000'}, {[EXCLUDE_PORTS]: '70x'}, {[INBOUND_PORTS]: ''}, {[INBOUND_PORTS]: '7100'},
			])}});
		}},
		{name: 'phase', weight: 2, can: ({pod}) => pod !== undefined, run: history => this.#change(history, {phase: history.draw.one(['Running', 'Succeeded', 'Failed', 'Unknown'])})},
		{name: 'deletion is asked for', weight: 1, can: ({pod}) => pod !== undefined, run: history => this.#change(history, {deletionTimestamp: '2026-01-01T00:00:00Z'})},
		{name: 'delete', weight: 2, can: ({pod}) => pod !== undefined, run: history => this.#delete(history)},
		{name: 'replace', weight: 3, can: ({pod}) => pod !== undefined, run: history => {
			const isKept = history.draw.chance(0.3);
			const said = !isKept && history.sandbox ? `${this.#takeDown(history, history.draw.chance(0.2))}; ` : '';
			this.#leave(history);
			this.#put(history, this.#drawPod(history));
			const started = !history.sandbox && history.draw.chance(0.4) ? `; ${this.#startSandbox(history)}` : '';
			return `${said}another pod of its name: ${JSON.stringify(history.pod)}${started}`;
		}},
		{name: 'sandbox ends', weight: 3, can: ({sandbox}) => sandbox !== undefined, run: history => this.#takeDown(history, history.draw.chance(0.2))},
		{name: 'sandbox again', weight: 4, can: ({pod, sandbox}) => pod !== undefined && sandbox !== undefined, run: history => `${this.#takeDown(history, history.draw.chance(0.3))}; ${this.#startSandbox(history)}`},
		{name: 'the left end', weight: 5, can: ({sandboxes}) => sandboxes.some(({isLeft}) => isLeft), run: history => this.#endLeft(history)},
		{name: 'DEL again', weight: 3, can: ({former}) => former !== undefined, run: history => {
			this.#cniDel(history, history.former!);
			return 'CNI DEL of a former sandbox, again';
		}},
		{name: 'nothing', weight: 1, can: () => true, run: () => 'nothing'},
	];

	readonly #lastSteps: readonly Step[] = [
		{name: 'delete', weight: 1, can: ({pod}) => pod !== undefined, run: history => this.#delete(history)},
		{name: 'sandbox ends', weight: 1, can: ({sandbox}) => sandbox !== undefined, run: history => this.#takeDown(history)},
		{name: 'the left end', weight: 1, can: ({sandboxes}) => sandboxes.some(({isLeft}) => isLeft), run: history => this.#endLeft(history)},
	];

	/** What a former pod of this name still has. */
	#leave({sandbox}: History): void {
		if (sandbox) {
			sandbox.isLeft = true;
		}
	}

	#delete(history: History): string {
		this.api.delete('pods', history.name);
		this.#set(history, undefined);
		return 'deleted';
	}

	#endLeft(history: History): string {
		for (const sandbox of history.sandboxes.filter(({isLeft}) => isLeft)) {
			this.#runtime.endSandbox(history, sandbox);
		}

		this.#silent(history);
		return 'the last process of its former sandbox ends';
	}

	// What the kernel holds.

	#compare(): void {
		const isLooking = this.agent?.pods.isSynced && this.agent.isIdle;
		this.#isTorn &&= !isLooking;
		const {held, text} = this.#read();
		if (!isLooking) {
			if (!this.#isTorn && text !== this.#held) {
				throw new Error(`something has changed while nobody knew what is to be\n${this.#held}\n${text}; ${this.#context()}`);
			}

			return;
		}

		this.#held = text;
		const entries = new Map<string, Entry>();
		for (const history of this.live) {
			const isKnown = history.silentSince === undefined || (this.agent!.looked.get(history.name) ?? 0) > history.silentSince || !this.agent!.pods.specs.has(history.name);
			const candidates = isKnown ? this.#looked(history) : this.#either(history);
			const is = held.get(history.name);
			const match = candidates.filter(entry => (entry && describe(entry)) === is?.text);
			if (match.length === 0) {
				this.#fail(history, `expected ${candidates.map(entry => entry ? describe(entry) : 'nothing').join(', or ')}; the kernel has ${is?.text ?? 'nothing'}`);
			}

			this.#checkRestored(history, match[0]);
			history.possible = match;
			if (isKnown) {
				history.silentSince = undefined;
			}

			held.delete(history.name);
			if (match[0]) {
				history.seen = {uid: this.#facts(history).pod?.uid ?? '', space: match[0].space};
				entries.set(history.name, match[0]);
				this.#count(`compared ${match[0].mode}`);
			} else {
				this.#count('compared none');
			}
		}

		if (held.size > 0) {
			throw new Error(`the kernel holds ${[...held.values()].map(({name, text}) => `${name} ${text}`).join(', ')}, which should be gone; ${this.#context()}`);
		}

		this.#compareAddresses(entries);
		this.#compareSettings(entries);
	}

	#read(): {readonly held: Map<string, Held>; readonly text: string} {
		try {
			for (const cookie of this.#datapath.maps.podInfo.keys()) {
				const space = this.#spaceOf(cookie);
				if (space) {
					this.#runtime.used.add(space);
				}
			}

			const isAlive = (cookie: bigint) => {
				const space = this.#spaceOf(cookie);
				return space !== undefined && this.host.isAlive(space);
			};

			const held = readHeld(this.#datapath, isAlive, this.#isTorn);
			return {held: new Map(held), text: [...[...held.values()].map(({name, text}) => `${name} ${text}`).sort(), ...readAddresses(this.#datapath)].join('\n')};
		} catch (error) {
			throw new Error(`${reasonOf(error)}; ${this.#context()}`, {cause: error});
		}
	}

	/** Every address is its pod's; one that two have had, that one's who has it now. */
	#compareAddresses(entries: ReadonlyMap<string, Entry>): void {
		const owners = new Map<string, Entry>();
		for (const entry of entries.values()) {
			for (const address of entry.addresses) {
				const has = this.host.isAlive(entry.space) && entry.space.addresses.has(address);
				if (!owners.has(address) || has) {
					owners.set(address, entry);
				}
			}
		}

		const wanted = [...owners].map(([address, {space: {cookie}}]) => `${address}/128 ${cookie}`).sort().join('\n');
		const is = readAddresses(this.#datapath).join('\n');
		if (wanted !== is) {
			const [missing, extra] = [[wanted, is], [is, wanted]].map(([one, other]) => one!.split('\n').filter(line => !other!.split('\n').includes(line)));
			const concerned = this.live.filter(({name}) => [...missing!, ...extra!].some(line => entries.get(name)?.addresses.includes(line.split('/')[0]!)));
			throw new Error(`addresses: missing ${missing!.join(', ')}, too many ${extra!.join(', ')}; ${this.#context(...concerned)}`);
		}
	}

	/** Of a captured pod, at each turn another. */
	#compareSettings(entries: ReadonlyMap<string, Entry>): void {
		const [name, entry] = entries.size > 0 ? this.draw.one([...entries]) : [];
		if (!entry || !this.host.isAlive(entry.space) || this.#runtime.unrecorded.has(entry.space) || lookAt(this.#facts(this.live.find(history => history.name === name)!), undefined, this.host)?.space !== entry.space) {
			return;
		}

		const wanted = new Set([...settingsOf(entry), ...this.#runtime.presets.get(entry.space) ?? []]);
		this.#compareSets(`settings in the namespace of ${name}`, wanted, this.host.settings(entry.space), this.live.find(history => history.name === name)!);
	}

	/** What was captured and lives on is as it was before. */
	#checkRestored(history: History, now: Entry | undefined): void {
		const [before] = history.possible;
		if (before && history.possible.length === 1 && before.space !== now?.space && this.host.isAlive(before.space) && !this.#runtime.unrecorded.has(before.space)) {
			this.#compareSets(`settings left in the former namespace of ${history.name}`, this.#runtime.presets.get(before.space) ?? new Set(), this.host.settings(before.space), history);
			this.#count('restored namespaces');
		}
	}

	#compareSets(what: string, wanted: ReadonlySet<string>, is: ReadonlySet<string>, history: History): void {
		if (!isDeepStrictEqual([...wanted].sort(), [...is].sort())) {
			this.#fail(history, `${what}: expected ${[...wanted].sort().join(', ') || 'none'}, there are ${[...is].sort().join(', ') || 'none'}`);
		}
	}

	/** Ends histories that are over, and takes back the namespaces that nobody has. */
	#tidy(): void {
		for (const history of [...this.live]) {
			if (history.isOver && history.possible.length === 1 && history.possible[0] === undefined && history.silentSince === undefined && !history.called && (this.#isHearing || !history.heard)) {
				this.live.splice(this.live.indexOf(history), 1);
				this.#count('histories');
			}
		}

		const {maps} = this.#datapath;
		const used = new Set([...this.live.flatMap(({possible}) => possible.map(entry => entry?.space.cookie)), ...this.#datapath.steeredPods(), ...maps.pods.keys(), ...maps.podInfo.keys()]);
		if (this.agent && !this.#isTorn) {
			this.#runtime.takeBack(({cookie}) => !used.has(cookie));
		}
	}

	#spaceOf(cookie: bigint): Space | undefined {
		return this.host.spaces.find(space => space.cookie === cookie);
	}

	// What is said.

	#count(what: string): void {
		this.counts.set(what, (this.counts.get(what) ?? 0) + 1);
	}

	#note(line: string): void {
		this.#count(line.replace(/ (?:is labelled|is deleted).*$/, ' changes').replace(/^namespace \S+/, 'a namespace'));
		this.lines.push(`tick ${this.ticks}: ${line}`);
	}

	#context(...histories: readonly History[]): string {
		return [
			`SIDESTEP_SEED=${this.seed}, tick ${this.ticks}`,
			...histories.flatMap(({index, name, log}) => [`history ${index}, ${name}:`, ...log.map(line => `  ${line}`)]),
			'lately:', ...this.lines.slice(-40).map(line => `  ${line}`),
		].join('\n');
	}

	#fail(history: History, problem: string, others: readonly History[] = []): never {
		const error = new Error(`pod ${history.name}: ${problem}; ${this.#context(history, ...others)}`);
		this.failure ??= error;
		throw error;
	}

	failure: Error | undefined;
}

test(`${HISTORIES} histories of pods end, at every step, in what the contract says of them`, async t => {
	t.timeout(900_000);
	const seed = Number(process.env['SIDESTEP_SEED'] ?? Date.now() % 1_000_000_007);
	t.log(`SIDESTEP_SEED=${seed}`);
	const world = World.create(t);
	const host = FakeHost.create(t, `${world.id}-h`, SPACES);
	const api = await FakeApiServer.start({tls: false, bookmarkMs: 500});
	world.onEnd(async () => api.stop());
	const clock = new Clock(t);
	const play = new Play(seed, world, host, api, clock);
	t.teardown(async () => play.close());
	const cpu = process.cpuUsage();
	const from = clock.realMs;
	await play.run();
	const {user, system} = process.cpuUsage(cpu);
	t.log(`${play.ticks} ticks, ${((clock.realMs - from) / 1000).toFixed(1)} s, ${((user + system) / 1e6).toFixed(1)} s of CPU (${(system / 1e6).toFixed(1)} in the kernel)`);
	t.log(Object.fromEntries([...play.counts, ['addresses of others', play.borrowed] as const].sort()));
	t.is(play.counts.get('histories'), HISTORIES);
});
