/**
What the kernel should hold for a pod, said anew from the contract (CAPTURE.md, section 1) and from what is true in the cluster and on the host: shares nothing with the agent. Pure.
*/
import type {FakeHost, Settings, Space} from '../helpers/fake-host.js';

export const AMBIENT_LABEL = 'istio.io/dataplane-mode';
export const SIDECAR = 'sidecar.istio.io/status';
export const DNS = 'ambient.istio.io/dns-capture';
export const BYPASS = 'ambient.istio.io/bypass-inbound-capture';
export const EXCLUDE_PORTS = 'traffic.sidecar.istio.io/excludeOutboundPorts';
export const INBOUND_PORTS = 'traffic.sidecar.istio.io/includeInboundPorts';
export const STATIC_HASH = 'kubernetes.io/config.hash';
export const EXCLUDED = 'kube-system';
export const ZTUNNELS = 'istio-system';

/** A pod's object. */
export interface PodFacts {
	readonly uid: string;
	readonly labels: Readonly<Record<string, string>>;
	readonly annotations: Readonly<Record<string, string>>;
	readonly hostNetwork: boolean;
	readonly phase: string;
	readonly ips: readonly string[];
	readonly deletionTimestamp?: string;
}

/** What the runtime said when it made the pod's sandbox. */
export interface Told {
	readonly uid: string;
	/** Of the sandbox, by the runtime. */
	readonly id: string;
	readonly ips: readonly string[];
	/** What the pod's status said then: it is older than the call, until it changes. */
	readonly statusIps: string;
	readonly file: string;
	readonly space: Space;
}

/** A pod that is captured. */
export interface Entry {
	readonly space: Space;
	readonly mode: 'ambient' | 'sidecar';
	readonly isSteered: boolean;
	readonly hasDns: boolean;
	/** Ports that are not as others, `15008 in`, in order. */
	readonly ports: string;
	readonly ips: readonly string[];
	readonly addresses: readonly string[];
}

type Capture = Pick<Entry, 'mode' | 'isSteered' | 'hasDns' | 'ports'>;
/** `nothing`: not captured; `as before`: nobody can say, so that what is in force stays as long as the namespace it is in force for. */
type Wanted = 'nothing' | 'as before' | Capture;

/** @param namespaceLabels - undefined when the cluster's namespace is not known. */
export function wantedOf(name: string, pod: PodFacts | undefined, namespaceLabels: Readonly<Record<string, string>> | undefined): Wanted {
	if (!pod) {
		return 'nothing';
	}

	if (!namespaceLabels) {
		return 'as before';
	}

	const [namespace] = name.split('/');
	const {labels, annotations} = pod;
	if (pod.hostNetwork || pod.phase === 'Succeeded' || pod.phase === 'Failed' || namespace === EXCLUDED) {
		return 'nothing';
	}

	if (annotations[SIDECAR] !== undefined) {
		return sidecarOf(annotations);
	}

	const isZtunnel = namespace === ZTUNNELS && labels['app'] === 'ztunnel';
	const isMeant = labels[AMBIENT_LABEL] === 'ambient' || (namespaceLabels[AMBIENT_LABEL] === 'ambient' && labels[AMBIENT_LABEL] !== 'none');
	return isZtunnel || !isMeant ? 'nothing' : ambientOf(annotations);
}

function ambientOf(annotations: PodFacts['annotations']): Wanted {
	const dns = annotations[DNS] ?? 'true';
	const bypass = annotations[BYPASS] ?? 'false';
	if (![dns, bypass].every(text => text === 'true' || text === 'false')) {
		return 'as before';
	}

	return {mode: 'ambient', isSteered: bypass === 'false', hasDns: dns === 'true', ports: bypass === 'false' ? '15008 in' : ''};
}

function sidecarOf(annotations: PodFacts['annotations']): Wanted {
	const excluded = annotations[EXCLUDE_PORTS] ?? '';
	const inbound = annotations[INBOUND_PORTS] ?? '*';
	if (!/^\d*$/.test(excluded)) {
		return 'as before';
	}

	const passed = inbound === '*' ? ['15008 in', '15020 in', '15021 in', '15090 in'] : inbound === '' ? [] : [`${inbound} in+`, '15008 in'];
	return {mode: 'sidecar', isSteered: inbound !== '', hasDns: false, ports: [...passed, ...(excluded === '' ? [] : [`${excluded} out`])].sort().join(', ')};
}

/** What the runtime said of its sandbox counts until the kubelet says something new. */
export function ipsOf(pod: PodFacts, told: Told | undefined): readonly string[] {
	return told?.uid === pod.uid && pod.ips.join() === told.statusIps ? told.ips : pod.ips;
}

/**
The namespace that the runtime named, or that the pod's oldest process with the pod's addresses lives in; for a pod without any such process, the one that it is captured in,
while that lives and has the pod's addresses.
*/
export function spaceOf(pod: PodFacts, ips: readonly string[], told: Told | undefined, before: Space | undefined, host: FakeHost): Space | undefined {
	const hasAll = (space: Space) => ips.every(ip => space.addresses.has(ip));
	if (told?.uid === pod.uid && host.files.get(told.file) === told.space && hasAll(told.space)) {
		return told.space;
	}

	const uids = [pod.uid, pod.annotations[STATIC_HASH]];
	const [oldest] = [...host.processes.values()]
		.filter(({uid, space}) => uids.includes(uid) && space !== undefined && hasAll(space))
		.sort((a, b) => a.startedAt - b.startedAt);
	return oldest?.space ?? (before && host.isAlive(before) && hasAll(before) ? before : undefined);
}

export interface Facts {
	readonly name: string;
	/** As the agent has heard of it. */
	readonly pod: PodFacts | undefined;
	readonly namespaceLabels: Readonly<Record<string, string>> | undefined;
	readonly told: Told | undefined;
}

/**
What the kernel holds of a pod after it was looked at, if it held `before`.

@param remembered - where the agent has seen the pod.
*/
export function lookAt({name, pod, namespaceLabels, told}: Facts, before: Entry | undefined, host: FakeHost, remembered?: Space): Entry | undefined {
	const wanted = wantedOf(name, pod, namespaceLabels);
	if (wanted === 'nothing') {
		return undefined;
	}

	const ips = ipsOf(pod!, told);
	const space = wanted === 'as before' || ips.length === 0 ? undefined : spaceOf(pod!, ips, told, before?.space ?? remembered, host);
	if (space) {
		return {space, ...wanted as Capture, ips, addresses: [...space.addresses]};
	}

	// An error never takes a pod out of capture; its end does.
	return before && host.isAlive(before.space) ? before : undefined;
}

/** What the agent needs in the namespace of a captured pod. */
export function settingsOf({mode, ips}: Entry): Settings {
	const has4 = ips.some(ip => !ip.includes(':'));
	const has6 = ips.some(ip => ip.includes(':'));
	if (mode === 'sidecar') {
		return new Set(has6 ? ['::6'] : []);
	}

	return new Set([
		'net/ipv4/tcp_fwmark_accept',
		...(has4 ? ['rule 4', 'route 4', 'net/ipv4/fwmark_reflect'] : []),
		...(has6 ? ['rule 6', 'route 6', 'net/ipv6/fwmark_reflect'] : []),
	]);
}
