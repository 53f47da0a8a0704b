/**
Makes the kernel equal to what the pods should have.

The kernel's maps are read at the first round and whenever the caller asks; in between, a copy is kept, so that one pod's change costs what that pod has. A pod's
namespace is opened only when the pod is due.
*/
import type {PodSpec} from '../config/pods-file.js';
import {AgentError, PodError, reasonOf} from '../errors.js';
import type {Datapath} from '../loader/datapath.js';
import {POD_INBOUND, POD_KEEP_SOURCE, type NetnsCookie, type PodInfo} from '../maps/schema.js';
import {applyChange, readKernel} from '../redirect/apply.js';
import {addressId, plan, type Change, type KernelIndex} from '../redirect/plan.js';
import {compilePolicy, type PodPolicy} from '../redirect/policy.js';
import {openPod, reopenNetns, scanNetns, type NetnsFile, type NetnsIdentity, type NetnsScan, type OpenedPod, type PodNetns} from './facts.js';
import {KEEPS_SOURCES, prepareNamespace, restoreNamespace} from './namespace.js';
import {readSockets, resetAccelerated, resetKeptSources, resetMissed} from './sockets.js';
import type {NetNs} from '../native.js';

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
	/** Names of those that were looked at. */
	readonly looked: ReadonlySet<string>;
}

export interface RoundOptions {
	/** The host's /proc, writable: see {@link openPod} and {@link prepareNamespace}. */
	readonly proc: string;
	/** Connections that are older than a pod's enrolment are aborted, as iptables would. */
	readonly resetOlder: boolean;
}

/** A pod as it was when it was last looked at. */
interface Known {
	readonly spec: PodSpec;
	readonly policy: PodPolicy;
	readonly file: NetnsFile;
	/** What it excludes and does not have. */
	readonly missingInterfaces: readonly string[];
	/** Its policy without the addresses that are another's, as last written. */
	written?: PodPolicy;
}

/** A pod that fails does not hold up the others, and what the kernel has for it stays as it is: an error never takes a pod out of capture. */
export class Reconciler {
	#kernel: KernelIndex | undefined;
	readonly #known = new Map<string, Known>();
	readonly #failures = new Map<string, Error>();

	constructor(readonly datapath: Datapath, readonly options: RoundOptions) {}

	/** @returns undefined for a pod that is not enrolled as it should be. */
	namespaceOf(name: string): PodNetns | undefined {
		const known = this.#failures.has(name) ? undefined : this.#known.get(name);
		return known && {...known.file, cookie: known.policy.cookie};
	}

	/** Where the kernel has a pod of this name captured, as of the last round. */
	formerOf(name: string): NetnsIdentity | undefined {
		const info = [...this.#kernel?.infos.values() ?? []].find(info => info.name === name);
		return info && {device: info.netnsDevice, inode: info.netnsInode};
	}

	/** Of the kernel's entries for a pod of this name, whatever is known of it. */
	modeInKernel(name: string): string | undefined {
		return [...this.#kernel?.infos.values() ?? []].find(info => info.name === name)?.mode;
	}

	/**
	@param specs - all pods there should be, by name. The kernel's entries of other names go.
	@param due - those that are looked at now; of the others, what is known of them holds, and of those never looked at, what the kernel has.
	@param reread - compare with what the maps hold now, in case somebody else wrote there.
	@throws the kernel's error when the maps cannot be read; the next round reads them again.
	*/
	round(specs: ReadonlyMap<string, PodSpec>, due: ReadonlySet<string>, reread: boolean): Round {
		const isFresh = reread || this.#kernel === undefined;
		if (isFresh) {
			this.#kernel = undefined;
			this.#kernel = readKernel(this.datapath.maps);
		}

		const opened = new Map<string, OpenedPod>();
		const files = new Map([...this.#known.values()].map(({policy, file}) => [policy.cookie, file]));
		try {
			this.#look(specs, due, opened);
			const rivals = this.#rivalsOf(due);
			this.#look(specs, rivals, opened);
			return new Turn(this.datapath, this.options, this.#kernel!, this.#known, this.#failures, specs, new Set([...due, ...rivals]), files).run(opened, isFresh);
		} catch (error) {
			this.#kernel = undefined;
			for (const name of opened.keys()) {
				this.#known.delete(name);
			}

			throw error;
		} finally {
			for (const {netns} of opened.values()) {
				netns.close();
			}
		}
	}

	/** Brings what is known of these pods up to date, and adds those that have a namespace to `opened`. */
	#look(specs: ReadonlyMap<string, PodSpec>, due: ReadonlySet<string>, opened: Map<string, OpenedPod>): void {
		for (const name of [...this.#known.keys(), ...this.#failures.keys()]) {
			if (!specs.has(name) || due.has(name)) {
				this.#known.delete(name);
				this.#failures.delete(name);
			}
		}

		for (const name of due) {
			const spec = specs.get(name);
			try {
				if (spec && 'refused' in spec.wish) {
					throw new PodError(name, spec.wish.refused.message, {cause: spec.wish.refused});
				}

				if (spec && 'capture' in spec.wish) {
					opened.set(name, openPod(spec, spec.wish.capture, this.options.proc));
				}
			} catch (error) {
				if (!spec?.isEnding) {
					this.#failures.set(name, asPodError(name, error));
				}
			}
		}

		const byCookie = new Map([...this.#known].map(([name, {policy}]) => [policy.cookie, name]));
		for (const [name, {facts}] of opened) {
			const twin = byCookie.get(facts.cookie);
			byCookie.set(facts.cookie, name);
			if (twin !== undefined && twin !== name) {
				// Which of two is right cannot be known, so neither is changed.
				for (const [one, other] of [[name, twin], [twin, name]] as const) {
					this.#failures.set(one, new PodError(one, `it has the same network namespace as pod ${other}: take one of them out of the pods file`));
					this.#known.delete(one);
				}
			}
		}

		for (const [name, {spec, capture, facts, file}] of opened) {
			try {
				if (due.has(name) && !this.#failures.has(name)) {
					const policy = compilePolicy({name, ...(spec.ips ? {ips: spec.ips} : {}), capture}, facts);
					this.#known.set(name, {spec, policy, file, missingInterfaces: capture.excludeInterfaces.filter(wanted => !facts.interfaces.some(other => other.name === wanted))});
				}
			} catch (error) {
				this.#failures.set(name, asPodError(name, error));
			}
		}
	}

	/** Pods that were not looked at, and have an address of one that was: perhaps their namespace has ended, and the address was given out again. */
	#rivalsOf(due: ReadonlySet<string>): ReadonlySet<string> {
		const claimed = new Set([...due].flatMap(name => this.#known.get(name)?.policy.addresses ?? []).map(key => addressId(key)));
		const kernel = this.#kernel!;
		return new Set([
			...[...this.#known].filter(([, {policy}]) => policy.addresses.some(key => claimed.has(addressId(key)))).map(([name]) => name),
			...[...kernel.infos].filter(([cookie, {name}]) => !this.#known.has(name) && [...kernel.addressesOf(cookie).keys()].some(id => claimed.has(id))).map(([, {name}]) => name),
		].filter(name => !due.has(name)));
	}
}

class Turn {
	readonly #changes: string[] = [];
	readonly #notes: string[] = [];
	#scan: NetnsScan | undefined;

	constructor(
		readonly datapath: Datapath,
		readonly options: RoundOptions,
		readonly kernel: KernelIndex,
		readonly known: ReadonlyMap<string, Known>,
		readonly failures: Map<string, Error>,
		readonly specs: ReadonlyMap<string, PodSpec>,
		readonly due: ReadonlySet<string>,
		/** Where namespaces were when they were last looked at. */
		readonly files: ReadonlyMap<NetnsCookie, NetnsFile>,
	) {}

	run(opened: ReadonlyMap<string, OpenedPod>, isFresh: boolean): Round {
		const {kernel, known, failures, due} = this;
		const own = new Map([...known.values()].map(({policy}) => [policy.cookie, policy]));
		const keep = new Set([...kernel.infos].filter(([cookie, info]) => !own.has(cookie) && this.#isKept(cookie, info, opened)).map(([cookie]) => cookie));
		const owners = kernel.owners(keep);
		const divided = this.#divideAddresses(new Map([...owners].map(([id, cookie]) => [id, kernel.infos.get(cookie)?.name ?? ''])));

		for (const cookie of this.datapath.steeredPods()) {
			// Before its entries go: a link without them refuses everything.
			if (((own.get(cookie)?.pod.flags ?? 0) & POD_INBOUND) === 0 && !keep.has(cookie)) {
				this.datapath.unsteer(cookie);
			}
		}

		const touched = [...divided].filter(([name, policy]) => isFresh || due.has(name) || !hasSameAddresses(known.get(name)!.written, policy));
		const before = new Map(touched.map(([, {cookie}]) => [cookie, kernel.pods.get(cookie)]));
		for (const change of plan(kernel, touched.map(([, policy]) => policy), new Set([...keep, ...own.keys()]))) {
			if (change.kind === 'remove') {
				this.#restore(change, kernel.infos.get(change.cookie));
			}

			this.#apply(change);
		}

		for (const [name, policy] of touched) {
			known.get(name)!.written = policy;
			const pod = opened.get(name);
			if (pod && !failures.has(name)) {
				const was = before.get(policy.cookie);
				this.#finish(policy, pod, {isNew: !was, losesSources: ((was?.flags ?? 0) & ~policy.pod.flags & POD_KEEP_SOURCE) !== 0});
			}
		}

		for (const [name, {missingInterfaces}] of known) {
			this.#notes.push(...missingInterfaces.map(missing => `pod ${name} excludes the interface ${missing}, which it does not have`));
		}

		const enrolled = [...known.keys()].filter(name => !failures.has(name));
		return {
			enrolled,
			failures: new Map(failures),
			looked: due,
			changes: this.#changes,
			notes: this.#notes,
			namespaces: new Map(enrolled.map(name => [known.get(name)!.policy.cookie, known.get(name)!.file])),
		};
	}

	/** The kernel's entries for a pod of which nothing is known stay while its namespace lives; not to be able to look is no reason to take them away. */
	#isKept(cookie: NetnsCookie, {name, netnsDevice, netnsInode}: PodInfo, opened: ReadonlyMap<string, OpenedPod>): boolean {
		const spec = this.specs.get(name);
		// Without its own entry, as an agent left it that died in the middle, nothing is in force.
		if (!spec || this.known.has(name) || 'leave' in spec.wish || !this.kernel.pods.has(cookie)) {
			return false;
		}

		if (!this.due.has(name)) {
			return true;
		}

		const pod = opened.get(name);
		if (pod?.facts.cookie === cookie) {
			this.#steerAgain(cookie, pod.netns);
			return true;
		}

		let netns: NetNs | undefined;
		try {
			netns = this.#find({device: netnsDevice, inode: netnsInode}, cookie);
		} catch (error) {
			this.#notes.push(`it cannot be seen whether the namespace of pod ${name} is still there (${reasonOf(error)}): its capture stays`);
			return true;
		}

		try {
			if (netns) {
				this.#steerAgain(cookie, netns);
			}
		} finally {
			netns?.close();
		}

		return netns !== undefined || this.#scan!.isBlind;
	}

	/** What is kept is kept whole: its link may be gone, by somebody else or by an agent that died as it took the pod away. */
	#steerAgain(cookie: NetnsCookie, netns: NetNs): void {
		if ((this.kernel.pods.get(cookie)?.flags ?? 0) & POD_INBOUND && !this.datapath.isSteered(cookie)) {
			this.datapath.steer(cookie, netns);
		}
	}

	#find(identity: NetnsIdentity, cookie: NetnsCookie): NetNs | undefined {
		this.#scan ??= scanNetns(this.options.proc);
		return this.#scan.open(identity, cookie);
	}

	/**
	What arrives for an address that two pods have cannot be told apart: it is the pod's that names it in `ips`, if only one does; else nobody's, and refused.

	@param kept - addresses, by {@link addressId}, of pods that stay as they are, and their names.
	@returns the known pods' policies, each without what is another's.
	*/
	#divideAddresses(kept: ReadonlyMap<string, string>): ReadonlyMap<string, PodPolicy> {
		const claims = new Map<string, string[]>();
		for (const [name, {policy}] of this.known) {
			for (const key of policy.addresses) {
				const id = addressId(key);
				const claimants = claims.get(id);
				if (claimants) {
					claimants.push(name);
				} else {
					claims.set(id, [name]);
				}
			}
		}

		const lost = new Map<string, Set<string>>();
		for (const [id, claimants] of claims) {
			const owner = kept.get(id);
			if (claimants.length === 1 && owner === undefined) {
				continue;
			}

			const named = claimants.filter(name => this.known.get(name)!.spec.ips?.includes(id.split('/', 1)[0]!));
			const winner = owner === undefined && named.length === 1 ? named[0] : undefined;
			for (const name of claimants.filter(candidate => candidate !== winner)) {
				lost.set(name, (lost.get(name) ?? new Set()).add(id));
			}

			const names = [...claimants, ...(owner === undefined ? [] : [owner])];
			this.#notes.push(`pods ${names.join(', ')} have the same address ${id}: what arrives for it is ${winner !== undefined ? `taken to be for ${winner}, which names it in ips` : owner === undefined ? 'refused; name each pod\'s own in ips' : `taken to be for ${owner}`}`);
		}

		return new Map([...this.known].map(([name, {policy}]) => {
			const ids = lost.get(name);
			return [name, ids ? {...policy, addresses: policy.addresses.filter(key => !ids.has(addressId(key)))} : policy];
		}));
	}

	#apply(change: Change): void {
		try {
			applyChange(this.datapath, change);
			this.kernel.record(change);
			this.#reread(change.cookie);
			this.#changes.push(describe(change));
		} catch (error) {
			this.failures.set(change.pod, error instanceof AgentError
				? new PodError(change.pod, `${error.message}; nothing was changed for it`, {cause: error})
				: new PodError(change.pod, `the kernel refused to ${change.kind} it (${reasonOf(error)}); nothing was changed for it`, {cause: error}));
		}
	}

	/** What is written about a pod is more than a step says: since when, and what was changed in its namespace. */
	#reread(cookie: NetnsCookie): void {
		const info = this.datapath.maps.podInfo.get(cookie);
		if (info) {
			this.kernel.infos.set(cookie, info);
		}
	}

	/** What the maps cannot do: the namespace's own settings, listeners that were there first, the link. */
	#finish(policy: PodPolicy, {netns}: OpenedPod, {isNew, losesSources}: {readonly isNew: boolean; readonly losesSources: boolean}): void {
		const {name} = policy.info;
		const {datapath, options} = this;
		try {
			if (losesSources) {
				resetKeptSources(readSockets(datapath, netns), netns);
			}

			if (prepareNamespace(datapath.maps, policy, netns, options.proc)) {
				this.#reread(policy.cookie);
				if (!isNew) {
					this.#changes.push(`restore the namespace settings of ${name}`);
				}
			}

			if (policy.pod.flags & POD_INBOUND) {
				netns.runIterator(datapath.programs.get('find_listeners')!);
				if (!datapath.isSteered(policy.cookie)) {
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
			this.#reread(policy.cookie);
			this.failures.set(name, new PodError(name, `its outbound traffic is captured, but its namespace could not be set up (${reasonOf(error)}): tried again soon`, {cause: error}));
		}
	}

	#restore({pod: name, cookie}: Change, info: PodInfo | undefined): void {
		if (!info || info.namespaceChanges === 0) {
			return;
		}

		try {
			const file = this.files.get(cookie);
			leaveNamespace(this.datapath, info, this.options.proc, identity => (file && reopenNetns(file, cookie)) ?? this.#find(identity, cookie));
		} catch (error) {
			this.failures.set(name, new PodError(name, `it is not captured any more, but settings in its namespace could not be taken back (${reasonOf(error)})`, {cause: error}));
		}
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

	const scan = scanNetns(proc);
	return datapath.maps.podInfo.entries().flatMap(([cookie, info]) => {
		try {
			leaveNamespace(datapath, info, proc, identity => scan.open(identity, cookie), true);
			return [];
		} catch (error) {
			return [new PodError(info.name, `not everything in its namespace could be taken back (${reasonOf(error)})`, {cause: error})];
		}
	});
}

/** Does nothing when the namespace is not found: it is about to end. */
function leaveNamespace(datapath: Datapath, {netnsDevice, netnsInode, namespaceChanges}: PodInfo, proc: string, find: (identity: NetnsIdentity) => NetNs | undefined, isUnload = false): void {
	const netns = namespaceChanges === 0 && !isUnload ? undefined : find({device: netnsDevice, inode: netnsInode});
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

function hasSameAddresses(one: PodPolicy | undefined, other: PodPolicy): boolean {
	return one !== undefined && one.addresses.length === other.addresses.length && one.addresses.every((key, index) => addressId(key) === addressId(other.addresses[index]!));
}

function asPodError(name: string, error: unknown): Error {
	return error instanceof PodError ? error : new PodError(name, reasonOf(error), {cause: error});
}

const describe = ({kind, pod, steps}: Change) => kind === 'sweep' ? `swept ${steps.length} left-over list entries` : `${kind} ${pod}`;
