/**
One round of the control loop: make the kernel equal to what the pods should have. Holds no state: each round starts from the maps.
*/
import type {PodSpec} from '../config/pods-file.js';
import {AgentError, PodError, hasErrno, reasonOf} from '../errors.js';
import type {Datapath} from '../loader/datapath.js';
import {POD_INBOUND, POD_KEEP_SOURCE, type AddressKey, type NetnsCookie, type PodInfo} from '../maps/schema.js';
import {applyChange, readKernelState} from '../redirect/apply.js';
import {plan, type Change} from '../redirect/plan.js';
import {compilePolicy, type PodPolicy} from '../redirect/policy.js';
import {findNetns, openPod, type NetnsFile, type OpenedPod} from './facts.js';
import {KEEPS_SOURCES, prepareNamespace, restoreNamespace} from './namespace.js';
import {readSockets, resetAccelerated, resetKeptSources, resetMissed} from './sockets.js';

export interface Round {
	/** Names of the pods that are enrolled as they should be. */
	readonly enrolled: readonly string[];
	/** By pod name; '' for what concerns no pod. */
	readonly failures: ReadonlyMap<string, Error>;
	/** What was changed, as `enrol default/web`. */
	readonly changes: readonly string[];
	/** What is not as one might expect, and no failure. */
	readonly notes: readonly string[];
	/** Where the enrolled pods' namespaces are. */
	readonly namespaces: ReadonlyMap<NetnsCookie, NetnsFile>;
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
	readonly #notes: string[] = [];

	constructor(readonly datapath: Datapath, readonly options: RoundOptions, readonly failures: Map<string, Error>) {}

	run(all: readonly Wanted[]): Round {
		const actual = readKernelState(this.datapath.maps);
		const keep = new Set<NetnsCookie>([...actual.infos].filter(([, info]) => this.failures.has(info.name) && !this.#hasEnded(info)).map(([cookie]) => cookie));
		const wanted = this.#divideAddresses(all, new Map(actual.addresses.filter(([, cookie]) => keep.has(cookie)).map(([key, cookie]) => [addressId(key), actual.infos.get(cookie)?.name ?? ''])));

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
			this.#notes.push(...pod.capture.excludeInterfaces.filter(name => !pod.facts.interfaces.some(other => other.name === name)).map(name => `pod ${policy.info.name} excludes the interface ${name}, which it does not have`));
			if (!this.failures.has(policy.info.name)) {
				const before = actual.pods.get(policy.cookie);
				this.#finish(policy, pod, {isNew: !before, isSteered: steered.includes(policy.cookie), losesSources: ((before?.flags ?? 0) & ~policy.pod.flags & POD_KEEP_SOURCE) !== 0});
			}
		}

		return {enrolled: wanted.map(({policy}) => policy.info.name).filter(name => !this.failures.has(name)), failures: this.failures, changes: this.#changes, notes: this.#notes, namespaces: new Map(wanted.map(({policy, pod}) => [policy.cookie, pod.file]))};
	}

	/** Its namespace is gone, and not only not to be read. */
	#hasEnded({name, netnsDevice, netnsInode}: PodInfo): boolean {
		if (!hasErrno(this.failures.get(name)?.cause, 'ENOENT', 'ESRCH')) {
			return false;
		}

		const netns = findNetns(this.options.proc, {device: netnsDevice, inode: netnsInode});
		netns?.close();
		return netns === undefined;
	}

	/**
	What arrives for an address that two pods have cannot be told apart: it is the pod's that names it in `ips`, if only one does; else nobody's, and refused.

	@param kept - addresses, by {@link addressId}, of pods that stay as they are, and their names.
	*/
	#divideAddresses(all: readonly Wanted[], kept: ReadonlyMap<string, string>): readonly Wanted[] {
		const claims = new Map<string, Wanted[]>();
		for (const one of all) {
			for (const key of one.policy.addresses) {
				const id = addressId(key);
				claims.set(id, [...claims.get(id) ?? [], one]);
			}
		}

		const lost = new Map<Wanted, Set<string>>();
		for (const [id, claimants] of claims) {
			const owner = kept.get(id);
			if (claimants.length === 1 && owner === undefined) {
				continue;
			}

			const named = claimants.filter(({pod}) => pod.spec.ips?.includes(id.split('/', 1)[0]!));
			const winner = owner === undefined && named.length === 1 ? named[0] : undefined;
			for (const one of claimants.filter(candidate => candidate !== winner)) {
				lost.set(one, (lost.get(one) ?? new Set()).add(id));
			}

			const names = [...claimants.map(({policy}) => policy.info.name), ...(owner === undefined ? [] : [owner])];
			this.#notes.push(`pods ${names.join(', ')} have the same address ${id}: what arrives for it is ${winner ? `taken to be for ${winner.policy.info.name}, which names it in ips` : owner === undefined ? 'refused; name each pod\'s own in ips' : `taken to be for ${owner}`}`);
		}

		return all.map(one => {
			const ids = lost.get(one);
			return ids ? {...one, policy: {...one.policy, addresses: one.policy.addresses.filter(key => !ids.has(addressId(key)))}} : one;
		});
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
	#finish(policy: PodPolicy, {netns}: OpenedPod, {isNew, isSteered, losesSources}: {readonly isNew: boolean; readonly isSteered: boolean; readonly losesSources: boolean}): void {
		const {name} = policy.info;
		const {datapath, options} = this;
		try {
			if (losesSources) {
				resetKeptSources(readSockets(datapath, netns), netns);
			}

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
			leaveNamespace(this.datapath, info, this.options.proc);
		} catch (error) {
			this.#fail(name, new PodError(name, `it is not captured any more, but settings in its namespace could not be taken back (${reasonOf(error)})`, {cause: error}));
		}
	}

	#fail(name: string, error: Error): void {
		this.failures.set(name, error);
	}
}

/**
For `sidestep unload`: aborts the accelerated connections of every captured pod, and leaves its namespace as it was.

@returns what could not be done.
*/
export function leaveNamespaces(datapath: Datapath, proc: string): readonly PodError[] {
	// First, as inbound connections need the settings.
	for (const cookie of datapath.steeredPods()) {
		datapath.unsteer(cookie);
	}

	return datapath.maps.podInfo.entries().flatMap(([, info]) => {
		try {
			leaveNamespace(datapath, info, proc, true);
			return [];
		} catch (error) {
			return [new PodError(info.name, `not everything in its namespace could be taken back (${reasonOf(error)})`, {cause: error})];
		}
	});
}

/** Does nothing when the namespace is not found: it is about to end. */
function leaveNamespace(datapath: Datapath, {netnsDevice, netnsInode, namespaceChanges}: PodInfo, proc: string, isUnload = false): void {
	const netns = namespaceChanges === 0 && !isUnload ? undefined : findNetns(proc, {device: netnsDevice, inode: netnsInode});
	try {
		if (netns) {
			const sockets = readSockets(datapath, netns);
			if (isUnload) {
				resetAccelerated(sockets, netns);
			}

			if (namespaceChanges & KEEPS_SOURCES) {
				resetKeptSources(sockets, netns);
			}

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

	return wanted;
}

const addressId = ({address, bits}: AddressKey) => `${address}/${bits}`;

function asPodError({name}: PodSpec, error: unknown): Error {
	return error instanceof PodError ? error : new PodError(name, reasonOf(error), {cause: error});
}

const describe = ({kind, pod, steps}: Change) => kind === 'sweep' ? `swept ${steps.length} left-over list entries` : `${kind} ${pod}`;
