/**
One round of the control loop: make the kernel equal to what the pods should have. Holds no state: each round starts from the maps.
*/
import type {PodSpec} from '../config/pods-file.js';
import {AgentError, PodError, reasonOf} from '../errors.js';
import type {Datapath} from '../loader/datapath.js';
import {POD_INBOUND, type NetnsCookie, type PodInfo} from '../maps/schema.js';
import {applyChange, readKernelState} from '../redirect/apply.js';
import {plan, type Change} from '../redirect/plan.js';
import {compilePolicy, type PodPolicy} from '../redirect/policy.js';
import {findNetns, openPod, type OpenedPod} from './facts.js';
import {prepareNamespace, restoreNamespace} from './namespace.js';
import {readSockets, resetMissed} from './sockets.js';

export interface Round {
	/** Names of the pods that are enrolled as they should be. */
	readonly enrolled: readonly string[];
	/** By pod name; '' for what concerns no pod. */
	readonly failures: ReadonlyMap<string, Error>;
	/** What was changed, as `enrol default/web`. */
	readonly changes: readonly string[];
}

export interface RoundOptions {
	/** The host's /proc, writable: see {@link openPod} and {@link prepareNamespace}. */
	readonly proc: string;
	/** Connections that are older than a pod's enrolment are aborted, as iptables would. */
	readonly resetOlder: boolean;
}

/** A pod that fails does not hold up the others, and what the kernel has for it stays as it is: an error never takes a pod out of capture. */
export function reconcile(datapath: Datapath, specs: readonly PodSpec[], options: RoundOptions): Round {
	const failures = new Map<string, Error>();
	const opened = openPods(specs, options.proc, failures);
	try {
		return new Turn(datapath, options, failures).run(compilePolicies(opened, failures));
	} finally {
		for (const {netns} of opened) {
			netns.close();
		}
	}
}

interface Wanted {
	readonly policy: PodPolicy;
	readonly pod: OpenedPod;
}

class Turn {
	readonly #changes: string[] = [];

	constructor(readonly datapath: Datapath, readonly options: RoundOptions, readonly failures: Map<string, Error>) {}

	run(all: readonly Wanted[]): Round {
		const actual = readKernelState(this.datapath.maps);
		const keep = new Set<NetnsCookie>([...actual.infos].filter(([, {name}]) => this.failures.has(name)).map(([cookie]) => cookie));
		const wanted = all.filter(({policy}) => {
			const owner = actual.addresses.find(([key, cookie]) => keep.has(cookie) && cookie !== policy.cookie && policy.addresses.some(other => other.address === key.address && other.bits === key.bits));
			if (owner) {
				this.#fail(policy.info.name, new PodError(policy.info.name, `its address ${owner[0].address} is also that of pod ${actual.infos.get(owner[1])?.name}`));
				keep.add(policy.cookie);
			}

			return !owner;
		});

		const steered = this.datapath.steeredPods();
		const inbound = new Set(wanted.filter(({policy}) => policy.pod.flags & POD_INBOUND).map(({policy}) => policy.cookie));
		for (const cookie of steered) {
			// Before its entries go: a link without them refuses everything.
			if (!inbound.has(cookie) && !keep.has(cookie)) {
				this.datapath.unsteer(cookie);
			}
		}

		for (const change of plan(actual, wanted.map(({policy}) => policy), keep)) {
			if (change.kind === 'remove') {
				this.#restore(change.pod, actual.infos.get(change.cookie));
			}

			this.#apply(change);
		}

		for (const {policy, pod} of wanted) {
			if (!this.failures.has(policy.info.name)) {
				this.#finish(policy, pod, {isNew: !actual.pods.has(policy.cookie), isSteered: steered.includes(policy.cookie)});
			}
		}

		return {enrolled: wanted.map(({policy}) => policy.info.name).filter(name => !this.failures.has(name)), failures: this.failures, changes: this.#changes};
	}

	#apply(change: Change): void {
		try {
			applyChange(this.datapath, change);
			this.#changes.push(describe(change));
		} catch (error) {
			this.#fail(change.pod, error instanceof AgentError
				? new PodError(change.pod, `${error.message}; nothing was changed for it`, {cause: error})
				: new PodError(change.pod, `the kernel refused to ${change.kind} it (${reasonOf(error)}); nothing was changed for it`, {cause: error}));
		}
	}

	/** What the maps cannot do: the namespace's own settings, listeners that were there first, the link. */
	#finish(policy: PodPolicy, {netns}: OpenedPod, {isNew, isSteered}: {readonly isNew: boolean; readonly isSteered: boolean}): void {
		const {name} = policy.info;
		const {datapath, options} = this;
		try {
			if (prepareNamespace(datapath.maps, policy, netns, options.proc) && !isNew) {
				this.#changes.push(`restore the namespace settings of ${name}`);
			}

			if (policy.pod.flags & POD_INBOUND) {
				netns.runIterator(datapath.programs.get('find_listeners')!);
				if (!isSteered) {
					datapath.steer(policy.cookie, netns);
				}
			}

			if (isNew && options.resetOlder) {
				const count = resetMissed(readSockets(datapath, netns), netns);
				if (count > 0) {
					this.#changes.push(`reset ${count} connections of ${name} that were older than its enrolment`);
				}
			}
		} catch (error) {
			this.#fail(name, new PodError(name, `its outbound traffic is captured, but its namespace could not be set up (${reasonOf(error)}): tried again at the next resync`, {cause: error}));
		}
	}

	#restore(name: string, info: PodInfo | undefined): void {
		if (!info || info.namespaceChanges === 0) {
			return;
		}

		try {
			restoreBy(info, this.options.proc);
		} catch (error) {
			this.#fail(name, new PodError(name, `it is not captured any more, but settings in its namespace could not be taken back (${reasonOf(error)})`, {cause: error}));
		}
	}

	#fail(name: string, error: Error): void {
		this.failures.set(name, error);
	}
}

/** Takes back what was changed in every captured pod's namespace; for `sidestep unload`. @returns what could not be. */
export function restoreNamespaces({maps}: Pick<Datapath, 'maps'>, proc: string): readonly PodError[] {
	return maps.podInfo.entries().filter(([, {namespaceChanges}]) => namespaceChanges !== 0).flatMap(([, info]) => {
		try {
			restoreBy(info, proc);
			return [];
		} catch (error) {
			return [new PodError(info.name, `settings in its namespace could not be taken back (${reasonOf(error)})`, {cause: error})];
		}
	});
}

function restoreBy({netnsDevice, netnsInode, namespaceChanges}: PodInfo, proc: string): void {
	const netns = findNetns(proc, {device: netnsDevice, inode: netnsInode});
	try {
		if (netns) {
			restoreNamespace(namespaceChanges, netns, proc);
		}
	} finally {
		netns?.close();
	}
}

function openPods(specs: readonly PodSpec[], proc: string, failures: Map<string, Error>): readonly OpenedPod[] {
	const opened: OpenedPod[] = [];
	for (const spec of specs) {
		try {
			if ('refused' in spec.wish) {
				throw new PodError(spec.name, spec.wish.refused.message, {cause: spec.wish.refused});
			}

			if ('capture' in spec.wish) {
				opened.push(openPod(spec, spec.wish.capture, proc));
			}
		} catch (error) {
			failures.set(spec.name, asPodError(spec, error));
		}
	}

	return opened;
}

function compilePolicies(opened: readonly OpenedPod[], failures: Map<string, Error>): readonly Wanted[] {
	const wanted: Wanted[] = [];
	for (const pod of opened) {
		const {spec, capture, facts} = pod;
		// Which of two is right cannot be known, so neither is changed.
		const twin = opened.find(other => other !== pod && other.facts.cookie === facts.cookie);
		try {
			if (twin) {
				throw new PodError(spec.name, `it has the same network namespace as pod ${twin.spec.name}: take one of them out of the pods file`);
			}

			wanted.push({policy: compilePolicy({name: spec.name, ...(spec.ips ? {ips: spec.ips} : {}), capture}, facts), pod});
		} catch (error) {
			failures.set(spec.name, asPodError(spec, error));
		}
	}

	const owners = new Map<string, Wanted>();
	const doubled = new Set<Wanted>();
	for (const one of wanted) {
		for (const {address, bits} of one.policy.addresses) {
			const other = owners.get(`${address}/${bits}`);
			owners.set(`${address}/${bits}`, one);
			if (other) {
				for (const [mine, theirs] of [[one, other], [other, one]] as const) {
					const {name} = mine.policy.info;
					failures.set(name, new PodError(name, `it has the same address (${address}) as pod ${theirs.policy.info.name}: what arrives for it cannot be told apart`));
					doubled.add(mine);
				}
			}
		}
	}

	return wanted.filter(one => !doubled.has(one));
}

function asPodError({name}: PodSpec, error: unknown): Error {
	return error instanceof PodError ? error : new PodError(name, reasonOf(error), {cause: error});
}

const describe = ({kind, pod, steps}: Change) => kind === 'sweep' ? `swept ${steps.length} left-over list entries` : `${kind} ${pod}`;
