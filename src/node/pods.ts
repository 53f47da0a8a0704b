/**
The pods of this node as Kubernetes has them, and what is to be captured of each.
*/
import {isDeepStrictEqual} from 'node:util';
import {InputError, reasonOf} from '../errors.js';
import type {PodSpec, Wish} from '../config/pods-file.js';
import type {KubernetesClient} from '../kubernetes/client.js';
import {STATIC_POD_HASH, readNamespace, readPod, type NamespaceObject, type PodObject} from '../kubernetes/objects.js';
import {Reflector, type ReflectorTiming} from '../kubernetes/reflector.js';
import {REDIRECTION} from '../kubernetes/status.js';
import {canonicalAddress} from '../maps/address.js';
import {accelerationOf, decideEnrolment, type NodeDefaults} from '../redirect/annotations.js';
import type {NetnsIdentity} from '../pods/facts.js';
import type {Locator} from './locator.js';

export interface NodePodsOptions {
	readonly client: KubernetesClient;
	readonly node: string;
	readonly defaults: NodeDefaults;
	/** Namespaces whose pods are left alone. */
	readonly excludeNamespaces: ReadonlySet<string>;
	readonly locator: Locator;
	readonly log: (line: string) => void;
	readonly timing?: Partial<ReflectorTiming>;
}

/** A pod that the CNI call tells of is often not in the cache yet. One that is not there after so long, with a server that answers, was deleted meanwhile. */
const CALLED_MS = 60_000;

interface PodInNamespace {
	readonly pod: PodObject;
	readonly namespaceLabels: Readonly<Record<string, string>>;
}

/** A pod that the CNI call told of before the watch did. */
interface CalledPod extends PodInNamespace {
	/** Who had its name then, as far as the watch had heard. */
	readonly formerUid: string | undefined;
	readonly at: number;
}

/** What the CNI call said. */
interface Sandbox {
	readonly id: string;
	readonly ips: readonly string[];
	/** The pod's status had these then: none yet, or those of the sandbox before. */
	readonly outdated: readonly string[];
}

export interface NodePodsListener {
	/** Called with the names of pods that are new, gone, or others than before; for the first time when all are known. */
	onChange(names: ReadonlySet<string>): void;
	/** Of these pods, what is reported of them ({@link REDIRECTION}) is another, and nothing else. */
	onReport(names: ReadonlySet<string>): void;
}

export class NodePods {
	readonly #options: NodePodsOptions;
	readonly #pods: Reflector<PodObject>;
	readonly #namespaces: Reflector<NamespaceObject>;
	readonly #specs = new Map<string, PodSpec>();
	readonly #called = new Map<string, CalledPod>();
	/** By name: what {@link specs} was made of. */
	readonly #read = new Map<string, PodObject>();
	/** By the pod's uid. */
	readonly #sandboxes = new Map<string, Sandbox>();
	#listener: NodePodsListener = {onChange() {}, onReport() {}};

	constructor(options: NodePodsOptions) {
		this.#options = options;
		const {client, node, log, timing} = options;
		this.#pods = new Reflector({
			client, log, path: '/api/v1/pods', query: {fieldSelector: `spec.nodeName=${node}`}, transform: readPod,
			onChange: keys => {
				this.#hear(keys);
			},
			...(timing ? {timing} : {}),
		});
		this.#namespaces = new Reflector({
			client, log, path: '/api/v1/namespaces', transform: readNamespace,
			onChange: keys => {
				this.#update([...this.#pods.items.values()].filter(({namespace}) => keys.has(namespace)).map(pod => nameOf(pod)));
			},
			...(timing ? {timing} : {}),
		});
	}

	/** By namespace/name; empty until {@link isSynced}. */
	get specs(): ReadonlyMap<string, PodSpec> {
		return this.#specs;
	}

	/** What was there at the start is in {@link specs}. Until then nothing may be taken away. */
	get isSynced(): boolean {
		return this.#pods.isSynced && this.#namespaces.isSynced;
	}

	get reflectors(): Readonly<Record<'pods' | 'namespaces', Reflector<PodObject | NamespaceObject>>> {
		return {pods: this.#pods as Reflector<PodObject | NamespaceObject>, namespaces: this.#namespaces};
	}

	/** Follows the API server until `signal` aborts. */
	async run(listener: NodePodsListener, signal: AbortSignal): Promise<void> {
		this.#listener = listener;
		await Promise.all([this.#pods.run(signal), this.#namespaces.run(signal)]);
	}

	/**
	@param name - namespace/name.
	@returns the one that a CNI call told of before one of another uid, which the watch has not heard the end of.
	*/
	pod(name: string): PodObject | undefined {
		const heard = this.#pods.items.get(name);
		const called = this.#called.get(name);
		return called && (!heard || heard.uid === called.formerUid) ? called.pod : heard;
	}

	/**
	For the CNI call: what is to be done with a pod that is being started, and is perhaps not in the cache.

	@param call - `uid` may be empty. `ips` and `netns` hold until this `sandbox` is forgotten.
	@throws KubernetesError; InputError when Kubernetes does not know the pod; PodError for its namespace.
	*/
	async call({name, uid, sandbox, ips, netns}: {readonly name: string; readonly uid: string; readonly sandbox: string; readonly ips: readonly string[]; readonly netns: string}, signal: AbortSignal): Promise<{readonly pod: PodObject; readonly wish: Wish}> {
		const heard = this.#pods.items.get(name);
		let found = this.#cached(name, uid);
		// A watch can fall silent, and what was heard be old: enough to capture a pod, and to be mended later; not enough to let it start uncaptured.
		if (!found || !('capture' in this.#wishFor(found.pod, found.namespaceLabels))) {
			found = await this.#ask(name, uid, signal);
		}

		const {pod, namespaceLabels} = found;
		const {node} = this.#options;
		if (pod.nodeName !== '' && pod.nodeName !== node) {
			throw new InputError(`pod ${name}`, `it starts here and is on node ${pod.nodeName} for the API server, but the agent follows those of ${node}: --node (NODE_NAME) is wrong`);
		}

		const wish = this.#wishFor(pod, namespaceLabels);
		if ('capture' in wish) {
			this.#options.locator.learn(name, pod.uid, netns);
			this.#sandboxes.set(pod.uid, {id: sandbox, ips, outdated: pod.podIPs});
			if (pod.uid !== heard?.uid) {
				this.#called.set(name, {pod, formerUid: heard?.uid, at: performance.now(), namespaceLabels});
			}
		}

		this.#update([name]);
		const specWish = this.#specs.get(name)?.wish;
		if ('capture' in wish && specWish && ('leave' in specWish || 'refused' in specWish)) {
			return {pod, wish: {waiting: `the agent has not heard yet that it is to be captured (so far: ${'leave' in specWish ? specWish.leave : specWish.refused.message})`}};
		}

		return {pod, wish};
	}

	#cached(name: string, uid: string): PodInNamespace | undefined {
		const pod = this.#pods.items.get(name);
		const namespaceLabels = pod && this.#namespaces.items.get(pod.namespace)?.labels;
		return namespaceLabels && isUid(pod, uid) ? {pod, namespaceLabels} : undefined;
	}

	async #ask(name: string, uid: string, signal: AbortSignal): Promise<PodInNamespace> {
		const {client} = this.#options;
		const [namespace, podName] = name.split('/').map(part => encodeURIComponent(part)) as [string, string];
		const [podAnswer, namespaceAnswer] = await Promise.all([client.get(`/api/v1/namespaces/${namespace}/pods/${podName}`, {signal}), client.get(`/api/v1/namespaces/${namespace}`, {signal})]);
		const pod = readPod(podAnswer);
		if (!pod || !isUid(pod, uid)) {
			throw new InputError(`pod ${name}`, `the API server has no such pod with the uid ${uid}: it was deleted, or replaced by another of its name`);
		}

		const namespaceLabels = readNamespace(namespaceAnswer)?.labels;
		if (!namespaceLabels) {
			throw new InputError(`pod ${name}`, `what the API server says about its namespace ${pod.namespace} is no namespace`);
		}

		return {pod, namespaceLabels};
	}

	/** Whether the CNI call, or a look at its processes, said that the pod is there. */
	isAt(uid: string, file: NetnsIdentity): boolean {
		return this.#options.locator.isAt(uid, file);
	}

	/** The sandbox is gone. That of an earlier one is said again when it is cleaned up, which may be after the next was made. */
	forget(name: string, uid: string, sandbox: string): void {
		const pod = this.pod(name);
		const gone = pod && isUid(pod, uid) ? pod.uid : uid || undefined;
		if (gone === undefined || (this.#sandboxes.get(gone)?.id ?? sandbox) !== sandbox) {
			return;
		}

		if (this.#called.get(name)?.pod.uid === gone) {
			this.#called.delete(name);
		}

		this.#sandboxes.delete(gone);
		this.#options.locator.forget(gone);
		this.#update([name]);
	}

	/** Of a pod whose report changed, and nothing else, there is nothing new to capture: each report that the agent makes is heard here again. */
	#hear(names: ReadonlySet<string>): void {
		const reported = new Set([...names].filter(name => this.#isReported(name)));
		if (reported.size < names.size || names.size === 0) {
			this.#update([...names].filter(name => !reported.has(name)));
		}

		if (reported.size > 0) {
			this.#listener.onReport(reported);
		}
	}

	#isReported(name: string): boolean {
		const before = this.#read.get(name);
		const now = this.#pods.items.get(name);
		return before !== undefined && now !== undefined && !this.#called.has(name) && isDeepStrictEqual(unreported(before), unreported(now));
	}

	#update(names: Iterable<string>): void {
		if (!this.isSynced) {
			return;
		}

		const all = new Set([...this.#specs.size === 0 ? this.#pods.items.keys() : [], ...names, ...this.#dropCalled()]);
		for (const name of all) {
			const pod = this.pod(name);
			const former = this.#read.get(name)?.uid;
			if (former !== undefined && former !== pod?.uid) {
				this.#sandboxes.delete(former);
				this.#options.locator.forget(former);
			}

			if (pod) {
				this.#read.set(name, pod);
				this.#specs.set(name, this.#specOf(name, pod));
			} else {
				this.#read.delete(name);
				this.#specs.delete(name);
			}
		}

		this.#listener.onChange(all);
	}

	/** @returns their names. */
	#dropCalled(): readonly string[] {
		const dropped: string[] = [];
		for (const [name, {pod, at}] of this.#called) {
			const isKnown = this.#pods.items.get(name)?.uid === pod.uid;
			const wasHeard = (this.#pods.caughtUpMs ?? 0) > at + CALLED_MS;
			if (isKnown || wasHeard) {
				this.#called.delete(name);
				dropped.push(name);
			}

			if (!isKnown && wasHeard) {
				this.#sandboxes.delete(pod.uid);
				this.#options.locator.forget(pod.uid);
			}
		}

		return dropped;
	}

	#specOf(name: string, pod: PodObject): PodSpec {
		const labels = this.#namespaces.items.get(pod.namespace)?.labels ?? this.#called.get(name)?.namespaceLabels;
		const wish: Wish = labels === undefined ? {waiting: `its namespace ${pod.namespace} is not known yet`} : this.#wishFor(pod, labels);
		const sandbox = this.#sandboxes.get(pod.uid);
		const told = sandbox && (pod.podIPs.length === 0 || isDeepStrictEqual(pod.podIPs, sandbox.outdated)) ? sandbox.ips : pod.podIPs;
		if (!('capture' in wish)) {
			return {name, wish};
		}

		let ips: readonly string[];
		try {
			ips = told.map(ip => canonicalAddress(ip));
		} catch (error) {
			return {name, wish: {refused: new InputError(`pod ${name}: its addresses`, reasonOf(error))}};
		}

		if (ips.length === 0) {
			return {name, wish: {waiting: 'it has no address yet'}};
		}

		const hash = pod.annotations[STATIC_POD_HASH];
		return {name, wish, ips, isEnding: pod.deletionTimestamp !== undefined, findNetns: () => this.#options.locator.find({name, uids: [pod.uid, ...(hash === undefined ? [] : [hash])], ips})};
	}

	#wishFor(pod: PodObject, namespaceLabels: Readonly<Record<string, string>>): Wish {
		const {labels, annotations, hostNetwork, phase, namespace} = pod;
		const metadata = {name: nameOf(pod), labels, annotations, namespaceLabels, hostNetwork, phase, namespaceExcluded: this.#options.excludeNamespaces.has(namespace)};
		try {
			const enrolment = decideEnrolment(metadata, this.#options.defaults);
			if (!enrolment.enrol) {
				return {leave: enrolment.why};
			}

			return {capture: {...enrolment.capture, acceleration: accelerationOf(metadata)}, warnings: enrolment.warnings};
		} catch (error) {
			if (error instanceof InputError) {
				return {refused: error};
			}

			throw error;
		}
	}
}

function unreported(pod: PodObject): PodObject {
	const {[REDIRECTION]: _, ...annotations} = pod.annotations;
	return {...pod, annotations};
}

/** The kubelet names a static pod by its hash, the API its mirror by another uid. */
const isUid = (pod: PodObject, uid: string) => uid === '' || pod.uid === uid || pod.annotations[STATIC_POD_HASH] === uid;

const nameOf = ({namespace, name}: PodObject) => `${namespace}/${name}`;
