/**
What the agent reads of Pods and Namespaces. Pure: no I/O. Nothing that a server sends is trusted to have the right shape: what is missing or of another type counts as
absent, and no function here throws.
*/

/** The kubelet makes a static pod's cgroup by this, as the API gives its mirror a uid of its own. */
export const STATIC_POD_HASH = 'kubernetes.io/config.hash';

/** What {@link Reflector} keeps. */
export interface KubernetesObject {
	readonly name: string;
	/** Absent for objects that live outside of namespaces. */
	readonly namespace?: string;
}

export interface PodObject extends KubernetesObject {
	readonly uid: string;
	readonly name: string;
	readonly namespace: string;
	readonly labels: Readonly<Record<string, string>>;
	/** Those that decide, only: others, such as the last applied configuration, can be hundreds of kilobytes. */
	readonly annotations: Readonly<Record<string, string>>;
	/** Empty while the pod is not on any node; so are the next two while they are not known. */
	readonly nodeName: string;
	/** `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`. */
	readonly phase: string;
	readonly serviceAccount: string;
	readonly hostNetwork: boolean;
	/** As the kubelet wrote them; empty until the pod has addresses. */
	readonly podIPs: readonly string[];
	/** RFC 3339; set from the moment its deletion was asked for. */
	readonly deletionTimestamp: string | undefined;
}

export interface NamespaceObject extends KubernetesObject {
	readonly labels: Readonly<Record<string, string>>;
}

/** What every object has, in the words of the API. */
export interface Metadata {
	readonly name: string;
	readonly namespace: string | undefined;
	readonly uid: string;
	/** Empty when the server sent none. */
	readonly resourceVersion: string;
}

type Fields = Readonly<Record<string, unknown>>;

/** @returns undefined for what has no name or no uid, so is no object. */
export function readMetadata(object: unknown): Metadata | undefined {
	const metadata = fields(fields(object)['metadata']);
	const name = text(metadata['name']);
	const uid = text(metadata['uid']);
	return name && uid ? {name, uid, namespace: text(metadata['namespace']) || undefined, resourceVersion: text(metadata['resourceVersion'])} : undefined;
}

/** @returns undefined for what is no pod. */
export function readPod(object: unknown): PodObject | undefined {
	const identity = readMetadata(object);
	if (identity?.namespace === undefined) {
		return undefined;
	}

	const {metadata, spec, status} = fields(object);
	return {
		uid: identity.uid,
		name: identity.name,
		namespace: identity.namespace,
		labels: strings(fields(metadata)['labels']),
		annotations: strings(fields(metadata)['annotations'], isKept),
		nodeName: text(fields(spec)['nodeName']),
		phase: text(fields(status)['phase']),
		serviceAccount: text(fields(spec)['serviceAccountName']),
		hostNetwork: fields(spec)['hostNetwork'] === true,
		podIPs: readAddresses(fields(status)),
		deletionTimestamp: text(fields(metadata)['deletionTimestamp']) || undefined,
	};
}

/** @returns undefined for what is no namespace. */
export function readNamespace(object: unknown): NamespaceObject | undefined {
	const identity = readMetadata(object);
	return identity && {name: identity.name, labels: strings(fields(fields(object)['metadata'])['labels'])};
}

/** The key of an object in a {@link Reflector}'s cache. */
export function keyOf({namespace, name}: {readonly namespace?: string | undefined; readonly name: string}): string {
	return namespace === undefined ? name : `${namespace}/${name}`;
}

function readAddresses(status: Fields): readonly string[] {
	const list = Array.isArray(status['podIPs']) ? status['podIPs'].map(item => text(fields(item)['ip'])).filter(Boolean) : [];
	const single = text(status['podIP']);
	return list.length === 0 && single ? [single] : list;
}

function isKept(annotation: string): boolean {
	const prefix = annotation.slice(0, annotation.indexOf('/') + 1);
	return prefix === 'istio.io/' || prefix.endsWith('.istio.io/') || prefix === 'sidestep.io/' || annotation === STATIC_POD_HASH;
}

function strings(value: unknown, isWanted: (key: string) => boolean = () => true): Readonly<Record<string, string>> {
	return Object.fromEntries(Object.entries(fields(value)).filter((entry): entry is [string, string] => typeof entry[1] === 'string' && isWanted(entry[0])));
}

function fields(value: unknown): Fields {
	return typeof value === 'object' && value !== null && !Array.isArray(value) ? value as Fields : {};
}

function text(value: unknown): string {
	return typeof value === 'string' ? value : '';
}
