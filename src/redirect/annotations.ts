/**
From a pod's labels and annotations to what is to be captured of it, by Istio's names and meanings. Pure: no I/O.

Where Istio skips a value that it cannot read, this refuses the pod: a range that is silently left out captures too much or too little.
*/
import {parse as parseYaml} from 'yaml';
import {InputError, reasonOf} from '../errors.js';
import {NO_ADDRESS, addressFromBytes, addressToBytes, isIpv4Address} from '../maps/address.js';
import type {Capture, Cidr} from './capture.js';

export interface PodMetadata {
	/** namespace/name. */
	readonly name: string;
	readonly labels: Readonly<Record<string, string>>;
	readonly annotations: Readonly<Record<string, string>>;
	readonly namespaceLabels: Readonly<Record<string, string>>;
	/** It has the node's network namespace. */
	readonly hostNetwork?: boolean;
	/** As Kubernetes writes it: `Running`, `Succeeded`, …. */
	readonly phase?: string;
	/** Whoever runs the node leaves the pod's namespace alone. */
	readonly namespaceExcluded?: boolean;
}

/** What holds where a pod's annotations say nothing. */
export interface NodeDefaults {
	readonly ambientDns: boolean;
	readonly sidecarDns: boolean;
	readonly sidecarUid: number;
	readonly sidecarGid: number;
	/** Where ztunnel's own pods are: they are not captured. */
	readonly systemNamespace: string;
}

export type Enrolment =
	| {readonly enrol: false; readonly why: string}
	/** `warnings` name annotations and labels that have no effect. */
	| {readonly enrol: true; readonly capture: Capture; readonly warnings: readonly string[]};

export const ISTIO_DEFAULTS: NodeDefaults = {ambientDns: true, sidecarDns: false, sidecarUid: 1337, sidecarGid: 1337, systemNamespace: 'istio-system'};

const OUTBOUND_PORT = 15_001;
const INBOUND_PORT = 15_006;
const TUNNEL_PORT = 15_008;
const DNS_PORT = 15_053;
/** Status, health and metrics of the sidecar. */
const SIDECAR_PORTS = [15_020, 15_021, 15_090];
/** Every socket of ztunnel has the first; the second is on those that bind the client's address. */
const ZTUNNEL_MARKS = [{value: 0x539, mask: 0xfff}, {value: 0x111, mask: 0xfff}];

const DATAPLANE_MODE = 'istio.io/dataplane-mode';
const SIDECAR_STATUS = 'sidecar.istio.io/status';
const INTERCEPTION_MODE = 'sidecar.istio.io/interceptionMode';
const EXCLUDE_INBOUND_PORTS = 'traffic.sidecar.istio.io/excludeInboundPorts';
const REROUTE = 'istio.io/reroute-virtual-interfaces';
const PROXY_CONFIG = 'proxy.istio.io/config';
const ACCELERATION = 'sidestep.io/acceleration';
const DNS_CAPTURE = 'ISTIO_META_DNS_CAPTURE';

/** Annotations of a mode: all names that Istio defines under a prefix. */
const FAMILIES = {
	ambient: {prefix: 'ambient.istio.io/', names: ['redirection', 'bypass-inbound-capture', 'dns-capture', 'waypoint-inbound-binding']},
	sidecar: {
		prefix: 'traffic.sidecar.istio.io/',
		names: [
			'includeOutboundIPRanges', 'excludeOutboundIPRanges', 'includeOutboundPorts', 'excludeOutboundPorts', 'includeInboundPorts', 'excludeInboundPorts',
			'excludeInterfaces', 'kubevirtInterfaces',
		],
	},
} as const;
type Mode = keyof typeof FAMILIES;

/** The agent's own report on the pod, left over from ambient mode or of the pod it was copied from. */
const OWN_REPORT = 'ambient.istio.io/redirection';

/**
Whether the pod is to be enrolled, and how.

@throws InputError naming the pod, and every annotation that cannot be read or honoured, with its value.
*/
export function decideEnrolment(pod: PodMetadata, defaults: NodeDefaults): Enrolment {
	const why = whyNot(pod, defaults);
	if (why !== undefined) {
		return {enrol: false, why};
	}

	const mode = hasSidecar(pod) ? 'sidecar' : 'ambient';
	const capture = mode === 'sidecar' ? sidecarCapture(pod, defaults) : ambientCapture(pod, defaults);
	return {enrol: true, capture, warnings: warningsOf(pod, capture)};
}

/**
What the pod says about its bytes; `auto` when it says nothing.

@throws InputError for another word.
*/
export function accelerationOf({name, annotations}: Pick<PodMetadata, 'name' | 'annotations'>): 'off' | 'auto' | 'on' {
	const text = annotations[ACCELERATION] ?? 'auto';
	if (text !== 'off' && text !== 'auto' && text !== 'on') {
		throw new InputError(`pod ${name}: annotation ${ACCELERATION}`, `expected off, auto or on, got ${quote(text)}`);
	}

	return text;
}

/** @throws InputError as {@link decideEnrolment}. */
export function ambientCapture(pod: PodMetadata, defaults: NodeDefaults): Capture {
	const annotations = new Annotations(pod, 'ambient');
	const bypassInbound = annotations.read('ambient.istio.io/bypass-inbound-capture', false, parseBoolean);
	const dns = annotations.read('ambient.istio.io/dns-capture', defaults.ambientDns, parseBoolean);
	annotations.read(REROUTE, undefined, refuseReroute);
	annotations.check();
	return {
		mode: 'ambient',
		exempt: {marks: ZTUNNEL_MARKS, uids: [], gids: [], cgroups: []},
		outbound: {port: OUTBOUND_PORT, excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'},
		...(bypassInbound ? {} : {inbound: {port: INBOUND_PORT, includePorts: '*', excludePorts: [TUNNEL_PORT], passNode: true}}),
		...(dns ? {dns: {port: DNS_PORT}} : {}),
		// Also without inbound capture: what arrives at the tunnel's port is passed on from the client's address.
		keepSource: true,
		excludeInterfaces: [],
	};
}

/** @throws InputError as {@link decideEnrolment}. */
export function sidecarCapture(pod: PodMetadata, defaults: NodeDefaults): Capture {
	const annotations = new Annotations(pod, 'sidecar');
	annotations.read(INTERCEPTION_MODE, undefined, refuseOtherThanRedirect);
	const includeRanges = annotations.read('traffic.sidecar.istio.io/includeOutboundIPRanges', '*', orEverything(parseRanges));
	const excludeRanges = annotations.read('traffic.sidecar.istio.io/excludeOutboundIPRanges', [], parseRanges);
	const includePorts = annotations.read('traffic.sidecar.istio.io/includeOutboundPorts', [], parsePorts);
	const excludePorts = annotations.read('traffic.sidecar.istio.io/excludeOutboundPorts', [], parsePorts);
	const inboundPorts = annotations.read('traffic.sidecar.istio.io/includeInboundPorts', '*', orEverything(parsePorts));
	const inboundExcluded = annotations.read(EXCLUDE_INBOUND_PORTS, [], parsePorts);
	const excludeInterfaces = annotations.read('traffic.sidecar.istio.io/excludeInterfaces', [], parseInterfaces);
	annotations.read('traffic.sidecar.istio.io/kubevirtInterfaces', undefined, refuseReroute);
	annotations.read(REROUTE, undefined, refuseReroute);
	const dns = annotations.read(PROXY_CONFIG, undefined, parseDnsCapture) ?? defaults.sidecarDns;
	annotations.check();

	// Istio reads the ports to exclude only where all are included.
	const inbound = inboundPorts === '*'
		? {includePorts: inboundPorts, excludePorts: [...new Set([TUNNEL_PORT, ...SIDECAR_PORTS, ...inboundExcluded])]}
		: {includePorts: inboundPorts, excludePorts: [TUNNEL_PORT]};
	return {
		mode: 'sidecar',
		exempt: {marks: [], uids: [], gids: [], cgroups: []},
		outbound: {port: OUTBOUND_PORT, excludePorts, includePorts, excludeRanges, includeRanges},
		...(inboundPorts.length > 0 ? {inbound: {port: INBOUND_PORT, ...inbound, passNode: false}} : {}),
		...(dns ? {dns: {port: DNS_PORT}} : {}),
		keepSource: false,
		excludeInterfaces,
		proxy: {uid: defaults.sidecarUid, gid: defaults.sidecarGid},
	};
}

function whyNot(pod: PodMetadata, defaults: NodeDefaults): string | undefined {
	if (pod.hostNetwork) {
		return 'it has the node\'s network namespace (hostNetwork)';
	}

	if (pod.phase === 'Succeeded' || pod.phase === 'Failed') {
		return `it has ended (phase ${pod.phase})`;
	}

	if (pod.namespaceExcluded) {
		return 'its namespace is excluded on this node';
	}

	if (hasSidecar(pod)) {
		return pod.annotations[INTERCEPTION_MODE] === 'NONE' ? `annotation ${INTERCEPTION_MODE} is NONE` : undefined;
	}

	if (pod.labels['app'] === 'ztunnel' && pod.name.startsWith(`${defaults.systemNamespace}/`)) {
		return 'it is ztunnel';
	}

	const mode = pod.labels[DATAPLANE_MODE];
	if (mode === 'ambient' || (mode !== 'none' && pod.namespaceLabels[DATAPLANE_MODE] === 'ambient')) {
		return undefined;
	}

	return mode === undefined
		? `it has no sidecar, and neither it nor its namespace has the label ${DATAPLANE_MODE}=ambient`
		: `its label ${DATAPLANE_MODE} is ${quote(mode)}`;
}

function hasSidecar(pod: PodMetadata): boolean {
	return pod.annotations[SIDECAR_STATUS] !== undefined;
}

/** What the pod asks for and does not get, though nothing is wrong with it: it may be meant for the other mode, or for a later Istio. */
export function warningsOf(pod: PodMetadata, {mode, inbound}: Capture): readonly string[] {
	const [own, other] = mode === 'ambient' ? ['ambient', 'sidecar'] as const : ['sidecar', 'ambient'] as const;
	const names = Object.keys(pod.annotations).sort();
	const label = pod.labels[DATAPLANE_MODE];
	const listed = new Set(inbound && inbound.includePorts !== '*' ? inbound.includePorts : []);
	const excluded = mode === 'sidecar' ? parsePorts(pod.annotations[EXCLUDE_INBOUND_PORTS] ?? '') : [];
	return [
		...names.filter(name => name.startsWith(FAMILIES[other].prefix) && name !== OWN_REPORT).map(name => `annotation ${name} has no effect in ${mode} mode`),
		...names.filter(name => strangerOf(name, own) !== undefined).map(name => `annotation ${name} is not known and has no effect`),
		...(mode === 'ambient' && label !== undefined && label !== 'ambient' ? [`label ${DATAPLANE_MODE} is ${quote(label)}, which is neither ambient nor none: the namespace's counts`] : []),
		...excluded.filter(port => listed.has(port)).map(port => `annotation ${EXCLUDE_INBOUND_PORTS} has no effect on port ${port}, which includeInboundPorts lists`),
	];
}

/** The part after the mode's prefix, if Istio does not define it. */
function strangerOf(annotation: string, mode: Mode): string | undefined {
	const {prefix, names} = FAMILIES[mode];
	const name = annotation.slice(prefix.length);
	return annotation.startsWith(prefix) && !names.some(known => known === name) ? name : undefined;
}

/** A pod's annotations, and what is wrong with them. */
class Annotations {
	readonly #problems: Array<readonly [annotation: string, problem: string]> = [];

	constructor(readonly pod: PodMetadata, mode: Mode) {
		for (const annotation of Object.keys(pod.annotations).sort()) {
			const stranger = strangerOf(annotation, mode);
			// A name that nobody knows may come with a later Istio and must not take the pod down; one that is nearly right is a slip of the pen.
			const meant = stranger === undefined ? undefined : FAMILIES[mode].names.find(name => isNearly(stranger, name));
			if (meant !== undefined) {
				this.#problems.push([annotation, `with value ${quote(pod.annotations[annotation]!)} is not known: did you mean ${FAMILIES[mode].prefix}${meant}?`]);
			}
		}
	}

	/** `otherwise` when the annotation is missing, or wrong, which {@link check} reports. */
	read<T>(annotation: string, otherwise: T, parse: (text: string) => T): T {
		const text = this.pod.annotations[annotation];
		if (text === undefined) {
			return otherwise;
		}

		try {
			return parse(text.trim());
		} catch (error) {
			if (!(error instanceof Refusal)) {
				throw error;
			}

			this.#problems.push([annotation, error.message]);
			return otherwise;
		}
	}

	/** @throws InputError with all that was wrong. */
	check(): void {
		const [first, ...more] = this.#problems;
		const where = `pod ${this.pod.name}`;
		if (first && more.length === 0) {
			throw new InputError(`${where}: annotation ${first[0]}`, first[1]);
		}

		if (first) {
			throw new InputError(where, this.#problems.map(([annotation, problem]) => `annotation ${annotation}: ${problem}`).join('; '));
		}
	}
}

/** A value is not what it should be. */
class Refusal extends Error {}

const SHOWN_PROBLEMS = 5;
const SHOWN_LENGTH = 100;

function quote(text: string): string {
	return JSON.stringify(text.length > SHOWN_LENGTH ? `${text.slice(0, SHOWN_LENGTH)}…` : text);
}

/** Comma-separated, with or without blanks; nothing is the empty list. Doubles are dropped. */
function parseList<T>(text: string, parseItem: (item: string) => T, identity: (value: T) => unknown): readonly T[] {
	if (text.trim() === '') {
		return [];
	}

	const values = new Map<unknown, T>();
	const problems: string[] = [];
	for (const item of text.split(',')) {
		try {
			const value = parseItem(item.trim());
			values.set(identity(value), value);
		} catch (error) {
			if (!(error instanceof Refusal)) {
				throw error;
			}

			problems.push(error.message);
		}
	}

	if (problems.length > 0) {
		const omitted = problems.length > SHOWN_PROBLEMS ? `, and ${problems.length - SHOWN_PROBLEMS} more` : '';
		throw new Refusal(problems.slice(0, SHOWN_PROBLEMS).join(', ') + omitted);
	}

	return [...values.values()];
}

function orEverything<T>(parse: (text: string) => readonly T[]): (text: string) => '*' | readonly T[] {
	return text => text === '*' ? '*' : parse(text);
}

const parsePorts = (text: string) => parseList(text, parsePort, port => port);
const parseRanges = (text: string) => parseList(text, parseRange, ({address, bits}) => `${address}/${bits}`);
const parseInterfaces = (text: string) => parseList(text, parseInterface, name => name);

function parsePort(item: string): number {
	const port = /^[1-9]\d{0,4}$/.test(item) ? Number(item) : 0;
	if (port < 1 || port > 65_535) {
		throw new Refusal(`${quote(item)} is not a port from 1 to 65535`);
	}

	return port;
}

function parseRange(item: string): Cidr {
	const [, text = '', digits = ''] = /^([\d.a-f:]+)\/(0|[1-9]\d{0,2})$/i.exec(item) ?? [];
	const isV4 = isIpv4Address(text);
	const bits = Number(digits);
	let bytes: Uint8Array | undefined;
	try {
		bytes = text === NO_ADDRESS ? undefined : addressToBytes(text);
	} catch {}

	if (!bytes || bits > (isV4 ? 32 : 128)) {
		throw new Refusal(`${quote(item)} is not a range such as 10.0.0.0/8 or fd00::/8`);
	}

	const written = addressFromBytes(bytes);
	if (!isV4 && isIpv4Address(written)) {
		throw new Refusal(`${quote(item)} is an IPv4 range in IPv6 form, which no connection matches: write it as IPv4`);
	}

	const network = isV4 ? bytes.subarray(12) : bytes;
	const address = addressFromBytes(network.map((byte, index) => byte & (0xff00 >> Math.min(8, Math.max(0, bits - (8 * index))))));
	// Istio looks at the address as it is written to tell whether loopback is included; here its host bits are gone.
	if (isLoopback(written) && !isLoopback(address)) {
		throw new Refusal(`${quote(item)} is a loopback address with a range that goes beyond loopback: write ${address || '::'}/${bits}, and loopback as a range of its own`);
	}

	return {address, bits};
}

function isLoopback(address: string): boolean {
	return address === '::1' || address.startsWith('127.');
}

function parseInterface(item: string): string {
	// Linux's IFNAMSIZ, less the closing zero.
	if (!/^\w[\w.-]{0,14}$/.test(item)) {
		throw new Refusal(`${quote(item)} is not the name of an interface (letters, digits and any of _ . -, at most 15 of them)`);
	}

	return item;
}

/** What Go's strconv.ParseBool takes. */
function parseBoolean(text: string): boolean {
	if (['1', 't', 'T', 'true', 'True', 'TRUE'].includes(text)) {
		return true;
	}

	if (['0', 'f', 'F', 'false', 'False', 'FALSE'].includes(text)) {
		return false;
	}

	throw new Refusal(`expected true or false, got ${quote(text)}`);
}

/** Whether a ProxyConfig in YAML asks for DNS capture; undefined when it does not say. The rest of it is the proxy's. */
function parseDnsCapture(text: string): boolean | undefined {
	let config: unknown;
	try {
		// maxAliasCount stops documents that grow without bound through aliases.
		config = parseYaml(text, {maxAliasCount: 100, logLevel: 'error'});
	} catch (error) {
		throw new Refusal(`expected YAML, got ${quote(text)} (${reasonOf(error).replace(/ at line .*$/, '')})`, {cause: error});
	}

	const asked = fieldOf(fieldOf(config, 'proxyMetadata', text), DNS_CAPTURE, text);
	if (asked === undefined) {
		return undefined;
	}

	try {
		return parseBoolean(String(asked));
	} catch (error) {
		throw new Refusal(`proxyMetadata.${DNS_CAPTURE}: ${reasonOf(error)}`, {cause: error});
	}
}

function fieldOf(value: unknown, key: string, text: string): unknown {
	if (value === undefined || value === null) {
		return undefined;
	}

	if (typeof value !== 'object' || Array.isArray(value)) {
		throw new Refusal(`expected a mapping that may have ${key}, got ${quote(text)}`);
	}

	return (value as Readonly<Record<string, unknown>>)[key] ?? undefined;
}

function refuseOtherThanRedirect(text: string): undefined {
	switch (text) {
		case 'REDIRECT': {
			return undefined;
		}

		case 'TPROXY': {
			throw new Refusal('got "TPROXY", which keeps the client\'s address up to the application by marks that only iptables rules give: only REDIRECT is supported');
		}

		case 'NONE': {
			throw new Refusal('got "NONE", which asks for no capture, of a pod that is to be captured: remove one of the two');
		}

		default: {
			throw new Refusal(`expected REDIRECT or NONE, got ${quote(text)}`);
		}
	}
}

function refuseReroute(text: string): undefined {
	if (text !== '') {
		throw new Refusal(`got ${quote(text)}: traffic that the pod forwards for a virtual machine or container inside it cannot be captured without tc programs: not supported`);
	}
}

/** At most two letters apart, or in other case. */
function isNearly(a: string, b: string): boolean {
	const [left, right] = [a.toLowerCase(), b.toLowerCase()];
	// Levenshtein's distances from the first n letters of `left` to every beginning of `right`, row by row.
	let row = Array.from({length: right.length + 1}, (_, column) => column);
	for (const [index, letter] of [...left].entries()) {
		const next = [index + 1];
		for (let column = 1; column <= right.length; column++) {
			next.push(Math.min(row[column]! + 1, next[column - 1]! + 1, row[column - 1]! + (letter === right[column - 1] ? 0 : 1)));
		}

		row = next;
	}

	return row[right.length]! <= 2;
}
