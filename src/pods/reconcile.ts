/**
Makes the kernel equal to what the pods should have.

The kernel's maps are read at the first round and whenever the caller asks; in between, a copy is kept, so that one pod's change costs what that pod has. A pod's
namespace is opened only when the pod is due.
*/
import type {PodSpec} from '../config/pods-file.js';
import {AgentError, NowhereError, PodError, TornChangeError, reasonOf} from '../errors.js';
import type {Datapath} from '../loader/datapath.js';
import {POD_INBOUND, POD_KEEP_SOURCE, type NetnsCookie, type PodInfo} from '../maps/schema.js';
import {applyChange, readKernel} from '../redirect/apply.js';
import {addressId, plan, type Change, type KernelIndex} from '../redirect/plan.js';
import {compilePolicy, type PodPolicy} from '../redirect/policy.js';
import {openPod, openSame, scanNetns, type NetnsFile, type NetnsIdentity, type NetnsScan, type OpenedPod, type PodNetns} from './facts.js';
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

/** What outlives a round, beside the copy of the kernel's maps. */
class Memory {
	readonly known = new Map<string, Known>();
	readonly failures = new Map<string, Error>();
	/** Where pods were when they were last looked at, by name; also of those that are not known, as another pod has the same namespace. */
	readonly cookies = new Map<string, NetnsCookie>();
	/** Enrolled, and not set up to the end since. */
	readonly unfinished = new Set<NetnsCookie>();
	/** Not captured any more, with settings in their namespace that could not be taken back yet. Of them `pod_info` has an entry, and `pods` has none. */
	readonly leftovers = new Map<NetnsCookie, PodError>();
}

/** A pod that fails does not hold up the others, and what the kernel has for it stays as it is: an error never takes a pod out of capture. */
export class Reconciler {
	#kernel: KernelIndex | undefined;
	/** The copy is not what the kernel has. */
	#isTorn = false;
	readonly #memory = new Memory();

	constructor(readonly datapath: Datapath, readonly options: RoundOptions) {}

	/** @returns undefined for a pod that is not enrolled as it should be. */
	namespaceOf(name: string): PodNetns | undefined {
		const known = this.#memory.failures.has(name) ? undefined : this.#memory.known.get(name);
		return known && {...known.file, cookie: known.policy.cookie};
	}

	/** Where the kernel has a pod of this name captured, as of the last round. */
	formerOf(name: string): NetnsIdentity | undefined {
		const info = this.#captured(name);
		return info && {device: info.netnsDevice, inode: info.netnsInode};
	}

	/** Of the kernel's entries for a pod of this name, whatever is known of it. */
	modeInKernel(name: string): string | undefined {
		return this.#captured(name)?.mode;
	}

	#captured(name: string): PodInfo | undefined {
		return [...this.#kernel?.infos ?? []].find(([cookie, info]) => info.name === name && this.#kernel!.pods.has(cookie))?.[1];
	}

	/**
	@param specs - all pods there should be, by name. The kernel's entries of other names go.
	@param due - those that are looked at now; of the others, what is known of them holds, and of those never looked at, what the kernel has.
	@param reread - compare with what the maps hold now, in case somebody else wrote there.
	@throws the kernel's error when the maps cannot be read; the next round reads them again.
	*/
	round(specs: ReadonlyMap<string, PodSpec>, due: ReadonlySet<string>, reread: boolean): Round {
		const isFresh = reread || this.#isTorn || this.#kernel === undefined;
		if (isFresh) {
			this.#kernel = undefined;
			this.#kernel = readKernel(this.datapath.maps);
			this.#isTorn = false;
		}

		const {known, cookies} = this.#memory;
		const opened = new Map<string, OpenedPod>();
		const files = new Map([...known.values()].map(({policy, file}) => [policy.cookie, file]));
		const left = new Set([...cookies].filter(([name]) => due.has(name) || !specs.has(name)).map(([, cookie]) => cookie));
		try {
			this.#look(specs, due, opened);
			const rivals = this.#rivalsOf(due, left);
			this.#look(specs, rivals, opened);
			const turn = new Turn(this.datapath, this.options, this.#kernel!, this.#memory, specs, new Set([...due, ...rivals]), files);
			const round = turn.run(opened, isFresh);
			this.#isTorn = turn.isTorn;
			return round;
		} catch (error) {
			this.#kernel = undefined;
			for (const name of opened.keys()) {
				known.delete(name);
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
		const {known, failures, cookies} = this.#memory;
		for (const name of [...known.keys(), ...failures.keys()]) {
			if (!specs.has(name) || due.has(name)) {
				known.delete(name);
				failures.delete(name);
			}
		}

		for (const name of cookies.keys()) {
			const wish = specs.get(name)?.wish;
			if (!wish || 'leave' in wish) {
				cookies.delete(name);
			}
		}

		for (const name of due) {
			const spec = specs.get(name);
			try {
				if (spec && 'refused' in spec.wish) {
					throw new PodError(name, spec.wish.refused.message, {cause: spec.wish.refused});
				}

				if (spec && 'capture' in spec.wish) {
					const pod = openPod(spec, spec.wish.capture, this.options.proc);
					opened.set(name, pod);
					cookies.set(name, pod.facts.cookie);
				}
			} catch (error) {
				const isNowhere = error instanceof NowhereError;
				if (!(spec?.isEnding && isNowhere)) {
					failures.set(name, asPodError(name, error));
				}

				if (isNowhere) {
					cookies.delete(name);
				}
			}
		}

		this.#refuseTwins(opened);
		for (const [name, {spec, capture, facts, file}] of opened) {
			try {
				if (due.has(name) && !failures.has(name)) {
					const policy = compilePolicy({name, ...(spec.ips ? {ips: spec.ips} : {}), capture}, facts);
					known.set(name, {spec, policy, file, missingInterfaces: capture.excludeInterfaces.filter(wanted => !facts.interfaces.some(other => other.name === wanted))});
				}
			} catch (error) {
				failures.set(name, asPodError(name, error));
			}
		}
	}

	/** Which of two pods in one namespace is right cannot be known, so neither is changed. */
	#refuseTwins(opened: ReadonlyMap<string, OpenedPod>): void {
		const {known, failures, cookies} = this.#memory;
		const names = new Map([...opened.values()].map(({facts}) => [facts.cookie, [] as string[]]));
		for (const [name, cookie] of cookies) {
			names.get(cookie)?.push(name);
		}

		for (const twins of names.values()) {
			for (const name of twins.length > 1 ? twins : []) {
				known.delete(name);
				if (!failures.has(name)) {
					failures.set(name, new PodError(name, `it has the same network namespace as pod ${twins.find(other => other !== name)}, and only one of the two can be captured: neither is changed until the other goes`));
				}
			}
		}
	}

	/**
	Pods that were not looked at, and whose namespace one that was looked at has or had; or that have an address of one that was: perhaps their namespace has ended, and the
	address was given out again.

	@param left - namespaces that pods had before they were looked at.
	*/
	#rivalsOf(due: ReadonlySet<string>, left: ReadonlySet<NetnsCookie>): ReadonlySet<string> {
		const {known, cookies} = this.#memory;
		const claimed = new Set([...due].flatMap(name => known.get(name)?.policy.addresses ?? []).map(key => addressId(key)));
		const taken = new Set([...left, ...[...due].map(name => cookies.get(name))]);
		const kernel = this.#kernel!;
		return new Set([
			...[...cookies].filter(([, cookie]) => taken.has(cookie)).map(([name]) => name),
			...[...known].filter(([, {policy}]) => policy.addresses.some(key => claimed.has(addressId(key)))).map(([name]) => name),
			...[...kernel.infos].filter(([cookie, {name}]) => !known.has(name) && [...kernel.addressesOf(cookie).keys()].some(id => claimed.has(id))).map(([, {name}]) => name),
		].filter(name => !due.has(name)));
	}
}

class Turn {
	readonly #changes: string[] = [];
	readonly #notes: string[] = [];
	#scan: NetnsScan | undefined;
	/** The kernel is not what its copy says. */
	isTorn = false;

	constructor(
		readonly datapath: Datapath,
		readonly options: RoundOptions,
		readonly kernel: KernelIndex,
		readonly memory: Memory,
		readonly specs: ReadonlyMap<string, PodSpec>,
		readonly due: ReadonlySet<string>,
		/** Where namespaces were when they were last looked at. */
		readonly files: ReadonlyMap<NetnsCookie, NetnsFile>,
	) {}

	run(opened: ReadonlyMap<string, OpenedPod>, isFresh: boolean): Round {
		const {kernel, due} = this;
		const {known, failures} = this.memory;
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
		for (const change of plan(kernel, touched.map(([, policy]) => policy), new Set([...keep, ...own.keys()]))) {
			const mustStay = change.kind === 'remove' && !this.#restore(change, isFresh);
			// What is written about it says what is left to be done, also to the next agent.
			this.#apply(mustStay ? {...change, steps: change.steps.filter(step => step.do !== 'delete info')} : change);
		}

		this.#tellLeftovers();
		for (const [name, policy] of touched) {
			known.get(name)!.written = policy;
			const pod = opened.get(name);
			if (pod && !failures.has(name)) {
				this.#finish(policy, pod);
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
		if (!spec || this.memory.known.has(name) || 'leave' in spec.wish || !this.kernel.pods.has(cookie)) {
			return false;
		}

		if (!this.due.has(name)) {
			return true;
		}

		const pod = opened.get(name);
		if (pod?.facts.cookie === cookie) {
			this.#steerAgain(cookie, name, pod.netns);
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
				this.#steerAgain(cookie, name, netns);
			}
		} finally {
			netns?.close();
		}

		return netns !== undefined || this.#scan!.isBlind;
	}

	/** What is kept is kept whole: its link may be gone, by somebody else or by an agent that died as it took the pod away. */
	#steerAgain(cookie: NetnsCookie, name: string, netns: NetNs): void {
		try {
			if ((this.kernel.pods.get(cookie)?.flags ?? 0) & POD_INBOUND && !this.datapath.isSteered(cookie)) {
				this.datapath.steer(cookie, netns);
			}
		} catch (error) {
			this.memory.failures.set(name, new PodError(name, `it stays captured, but for what comes in: that could not be taken up again (${reasonOf(error)})`, {cause: error}));
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
		for (const [name, {policy}] of this.memory.known) {
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

			const named = claimants.filter(name => this.memory.known.get(name)!.spec.ips?.includes(id.split('/', 1)[0]!));
			const winner = owner === undefined && named.length === 1 ? named[0] : undefined;
			for (const name of claimants.filter(candidate => candidate !== winner)) {
				lost.set(name, (lost.get(name) ?? new Set()).add(id));
			}

			const names = [...claimants, ...(owner === undefined ? [] : [owner])];
			this.#notes.push(`pods ${names.join(', ')} have the same address ${id}: what arrives for it is ${winner !== undefined ? `taken to be for ${winner}, which names it in ips` : owner === undefined ? 'refused; name each pod\'s own in ips' : `taken to be for ${owner}`}`);
		}

		return new Map([...this.memory.known].map(([name, {policy}]) => {
			const ids = lost.get(name);
			return [name, ids ? {...policy, addresses: policy.addresses.filter(key => !ids.has(addressId(key)))} : policy];
		}));
	}

	#apply(change: Change): void {
		const {kind, pod, cookie, steps} = change;
		if (steps.length === 0) {
			return;
		}

		const {failures, unfinished} = this.memory;
		try {
			applyChange(this.datapath, change);
		} catch (error) {
			this.isTorn ||= error instanceof TornChangeError;
			const why = error instanceof AgentError ? error.message : `the kernel refused to ${kind} it (${reasonOf(error)})`;
			failures.set(pod, new PodError(pod, error instanceof TornChangeError ? why : `${why}; nothing was changed for it`, {cause: error}));
			return;
		}

		if (kind === 'enrol') {
			unfinished.add(cookie);
		} else if (kind === 'remove') {
			unfinished.delete(cookie);
		}

		this.kernel.record(change);
		this.#reread(cookie);
		this.#changes.push(describe(change));
	}

	/** What is written about a pod is more than a step says: since when, and what was changed in its namespace. */
	#reread(cookie: NetnsCookie): void {
		const info = this.datapath.maps.podInfo.get(cookie);
		if (info) {
			this.kernel.infos.set(cookie, info);
		}
	}

	/** What the maps cannot do: the namespace's own settings, listeners that were there first, the link. */
	#finish(policy: PodPolicy, {netns}: OpenedPod): void {
		const {name} = policy.info;
		const {datapath, options, kernel} = this;
		const {failures, unfinished} = this.memory;
		const isNew = unfinished.has(policy.cookie);
		try {
			const {namespaceChanges} = kernel.infos.get(policy.cookie)!;
			if (namespaceChanges & KEEPS_SOURCES && !(policy.pod.flags & POD_KEEP_SOURCE)) {
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

			unfinished.delete(policy.cookie);
		} catch (error) {
			this.#reread(policy.cookie);
			failures.set(name, new PodError(name, `its outbound traffic is captured, but its namespace could not be set up (${reasonOf(error)}): tried again soon`, {cause: error}));
		}
	}

	/** @returns whether nothing of it is left in its namespace. What is left is tried again as often as the pod is looked at, and the maps are read. */
	#restore({pod: name, cookie}: Change, isFresh: boolean): boolean {
		const {leftovers, failures} = this.memory;
		const info = this.kernel.infos.get(cookie);
		const former = leftovers.get(cookie);
		if (!info || info.namespaceChanges === 0 || (former && !isFresh && !this.due.has(name))) {
			return former === undefined;
		}

		if (former && failures.get(name) === former) {
			failures.delete(name);
		}

		leftovers.delete(cookie);
		try {
			const file = this.files.get(cookie);
			leaveNamespace(this.datapath, cookie, info, this.options.proc, () => (file && openSame(file.path, file, cookie)) ?? this.#find({device: info.netnsDevice, inode: info.netnsInode}, cookie));
		} catch (error) {
			this.#reread(cookie);
			leftovers.set(cookie, new PodError(name, `it is not captured any more, but settings in its namespace could not be taken back (${reasonOf(error)}): tried again soon`, {cause: error}));
			return false;
		}

		return true;
	}

	#tellLeftovers(): void {
		const {known, failures, leftovers} = this.memory;
		for (const [cookie, error] of leftovers) {
			if (this.kernel.pods.has(cookie) || !this.kernel.infos.has(cookie)) {
				leftovers.delete(cookie);
			} else if (known.has(error.pod) || (failures.get(error.pod) ?? error) !== error) {
				// Another namespace is its pod's by now.
				this.#notes.push(error.message);
			} else {
				failures.set(error.pod, error);
			}
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
			leaveNamespace(datapath, cookie, info, proc, () => scan.open({device: info.netnsDevice, inode: info.netnsInode}, cookie), true);
			return [];
		} catch (error) {
			return [new PodError(info.name, `not everything in its namespace could be taken back (${reasonOf(error)})`, {cause: error})];
		}
	});
}

/** Does nothing when the namespace is not found: it is about to end. */
function leaveNamespace(datapath: Datapath, cookie: NetnsCookie, {namespaceChanges}: PodInfo, proc: string, find: () => NetNs | undefined, isUnload = false): void {
	const netns = namespaceChanges === 0 && !isUnload ? undefined : find();
	try {
		if (netns) {
			const sockets = readSockets(datapath, netns);
			if (isUnload) {
				resetAccelerated(sockets, netns);
			}

			if (namespaceChanges & KEEPS_SOURCES) {
				resetKeptSources(sockets, netns);
			}

			restoreNamespace(datapath.maps, cookie, netns, proc);
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
