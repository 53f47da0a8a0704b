/**
The rules that Istio installs, as the reference: cni/pkg/iptables/iptables.go (ambient) and tools/istio-iptables/pkg/capture/run.go (sidecar, REDIRECT, all
DNS captured) of istio/istio, for both families.
*/
import {writeFileSync} from 'node:fs';
import path from 'node:path';
import type {Pod} from './world.js';

const PROXY_MARK = '0x539/0xfff';
/** On connections that come from the proxy in the client's name: their answers have to stay in the pod. */
const REPLY_MARK = '0x111/0xfff';
/** The uid and gid of a sidecar. */
export const SIDECAR_ID = 1337;
/** Ports of the sidecar's own that the injector excludes beside the annotation's. */
const SIDECAR_PORTS = '15090,15021,15020';

/** What `world.node` shows to an ambient pod instead of its own address. */
export const PROBE_SOURCE = {4: '169.254.7.127', 6: 'fd16:9254:7127:1337:ffff:ffff:ffff:ffff'} as const;

interface Family {
	readonly version: 4 | 6;
	readonly restore: string;
	readonly loopback: string;
	/** Where a sidecar's inbound connections come from. */
	readonly passthrough: string;
}

const FAMILIES: readonly Family[] = [
	{version: 4, restore: 'iptables-restore', loopback: '127.0.0.1/32', passthrough: '127.0.0.6/32'},
	{version: 6, restore: 'ip6tables-restore', loopback: '::1/128', passthrough: '::6/128'},
];

type Tables = Readonly<Record<string, readonly string[]>>;

/** Appends to each table of the pod, with the chains named ISTIO_… that its rules speak of. */
function restore(pod: Pod, family: Family, tables: Tables): void {
	const text = Object.entries(tables).flatMap(([table, rules]) => {
		const chains = new Set(rules.join('\n').match(/\bISTIO_\w+/g));
		return [`*${table}`, ...[...chains].map(chain => `-N ${chain}`), ...rules.map(rule => `-A ${rule}`), 'COMMIT', ''];
	});
	const file = path.join(pod.world.directory, `${pod.name}-${family.restore}`);
	writeFileSync(file, text.join('\n'));
	pod.must(family.restore, '--noflush', file);
}

export interface AmbientOptions {
	readonly dns?: boolean;
	/** The annotation ambient.istio.io/bypass-inbound-capture. */
	readonly bypassInbound?: boolean;
}

export function ambientRules(pod: Pod, {dns = false, bypassInbound = false}: AmbientOptions = {}): void {
	for (const family of FAMILIES) {
		pod.must('ip', `-${family.version}`, 'rule', 'add', 'fwmark', REPLY_MARK, 'pref', '32764', 'lookup', '100');
		pod.must('ip', `-${family.version}`, 'route', 'add', 'local', 'default', 'dev', 'lo', 'table', '100');
		const {loopback} = family;
		const probes = PROBE_SOURCE[family.version];
		restore(pod, family, {
			mangle: [
				'PREROUTING -j ISTIO_PRERT',
				'OUTPUT -j ISTIO_OUTPUT',
				...bypassInbound ? [] : [`ISTIO_PRERT -m mark --mark ${PROXY_MARK} -j CONNMARK --set-xmark ${REPLY_MARK}`],
				`ISTIO_OUTPUT -m connmark --mark ${REPLY_MARK} -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff`,
			],
			nat: [
				'OUTPUT -j ISTIO_OUTPUT',
				'PREROUTING -j ISTIO_PRERT',
				...bypassInbound ? [] : [
					`ISTIO_PRERT -s ${probes} -p tcp -m tcp -j ACCEPT`,
					`ISTIO_PRERT ! -d ${loopback} -p tcp ! --dport 15008 -m mark ! --mark ${PROXY_MARK} -j REDIRECT --to-ports 15006`,
				],
				`ISTIO_OUTPUT -d ${probes} -p tcp -m tcp -j ACCEPT`,
				...dns ? [
					`ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark ${PROXY_MARK} -m udp --dport 53 -j REDIRECT --to-port 15053`,
					`ISTIO_OUTPUT ! -d ${loopback} -p tcp --dport 53 -m mark ! --mark ${PROXY_MARK} -j REDIRECT --to-ports 15053`,
				] : [],
				`ISTIO_OUTPUT -p tcp -m mark --mark ${REPLY_MARK} -j ACCEPT`,
				`ISTIO_OUTPUT ! -d ${loopback} -o lo -j ACCEPT`,
				`ISTIO_OUTPUT ! -d ${loopback} -p tcp -m mark ! --mark ${PROXY_MARK} -j REDIRECT --to-ports 15001`,
			],
			...dns ? {raw: [
				'PREROUTING -j ISTIO_PRERT',
				'OUTPUT -j ISTIO_OUTPUT',
				`ISTIO_OUTPUT -p udp -m mark --mark ${PROXY_MARK} -m udp --dport 53 -j CT --zone 1`,
				`ISTIO_PRERT -p udp -m mark ! --mark ${PROXY_MARK} -m udp --sport 53 -j CT --zone 1`,
			]} : {},
		});
		// Istio asks an ipset for the pod's address.
		const address = family.version === 4 ? pod.ipv4 : pod.ipv6;
		if (address) {
			restore(pod.world.node, family, {nat: [`POSTROUTING -m owner --socket-exists -p tcp -d ${address} -j SNAT --to-source ${probes}`]});
		}
	}
}

/** Values as in the annotations traffic.sidecar.istio.io/<name>. */
export interface SidecarOptions {
	readonly includeOutboundIPRanges?: string;
	readonly excludeOutboundIPRanges?: string;
	readonly includeOutboundPorts?: string;
	readonly excludeOutboundPorts?: string;
	readonly includeInboundPorts?: string;
	readonly excludeInboundPorts?: string;
	readonly excludeInterfaces?: string;
}

const list = (text: string) => text.split(',').map(item => item.trim()).filter(Boolean);

function sidecarNat(family: Family, options: SidecarOptions, dns: boolean): string[] {
	const {includeOutboundIPRanges = '*', excludeOutboundIPRanges = '', includeOutboundPorts = '', excludeOutboundPorts = '', includeInboundPorts = '*', excludeInboundPorts = '', excludeInterfaces = ''} = options;
	const {loopback, passthrough} = family;
	const ofFamily = (ranges: string) => list(ranges).filter(range => range.includes(':') === (family.version === 6));
	const capturesLoopback = list(includeOutboundIPRanges).some(range => /^(?:127\.|::1\/)/.test(range));
	const ownTraffic = (owner: string, toItself: string) => [
		`ISTIO_OUTPUT -o lo ! -d ${loopback} -p tcp ${toItself} -m owner ${owner} -j ISTIO_IN_REDIRECT`,
		...capturesLoopback ? [] : [`ISTIO_OUTPUT -o lo ${dns ? '-p tcp ! --dport 53 ' : ''}-m owner ! ${owner} -j RETURN`],
		`ISTIO_OUTPUT -m owner ${owner} -j RETURN`,
	];
	return [
		...list(excludeInterfaces).flatMap(name => [`PREROUTING -i ${name} -j RETURN`, `OUTPUT -o ${name} -j RETURN`]),
		'ISTIO_INBOUND -p tcp --dport 15008 -j RETURN',
		'ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001',
		'ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006',
		...includeInboundPorts ? ['PREROUTING -p tcp -j ISTIO_INBOUND'] : [],
		...includeInboundPorts === '*' ? [
			...list(`${SIDECAR_PORTS},${excludeInboundPorts}`).map(port => `ISTIO_INBOUND -p tcp --dport ${port} -j RETURN`),
			'ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT',
		] : list(includeInboundPorts).map(port => `ISTIO_INBOUND -p tcp --dport ${port} -j ISTIO_IN_REDIRECT`),
		'OUTPUT -j ISTIO_OUTPUT',
		...list(excludeOutboundPorts).flatMap(port => ['tcp', 'udp'].map(protocol => `ISTIO_OUTPUT -p ${protocol} --dport ${port} -j RETURN`)),
		`ISTIO_OUTPUT -o lo -s ${passthrough} -j RETURN`,
		...ownTraffic(`--uid-owner ${SIDECAR_ID}`, dns ? '-m multiport ! --dports 53,15008' : '! --dport 15008'),
		...ownTraffic(`--gid-owner ${SIDECAR_ID}`, '! --dport 15008'),
		...dns ? [
			'ISTIO_OUTPUT -j ISTIO_OUTPUT_DNS',
			'ISTIO_OUTPUT_DNS -p tcp --dport 53 -j REDIRECT --to-ports 15053',
			'ISTIO_OUTPUT_DNS -p udp --dport 53 -j REDIRECT --to-port 15053',
		] : [],
		`ISTIO_OUTPUT -d ${loopback} -j RETURN`,
		...ofFamily(excludeOutboundIPRanges).map(range => `ISTIO_OUTPUT -d ${range} -j RETURN`),
		...list(includeOutboundPorts).map(port => `ISTIO_OUTPUT -p tcp --dport ${port} -j ISTIO_REDIRECT`),
		...includeOutboundIPRanges === '*' ? ['ISTIO_OUTPUT -j ISTIO_REDIRECT'] : ofFamily(includeOutboundIPRanges).map(range => `ISTIO_OUTPUT -d ${range} -j ISTIO_REDIRECT`),
	];
}

/** Conntrack zones, so that an application's query and the proxy's own with the same ports are two things. */
const SIDECAR_RAW = [
	'OUTPUT -j ISTIO_OUTPUT_DNS',
	...['--uid-owner', '--gid-owner'].flatMap(owner => [
		`ISTIO_OUTPUT_DNS -p udp --dport 53 -m owner ${owner} ${SIDECAR_ID} -j CT --zone 1`,
		`ISTIO_OUTPUT_DNS -p udp --sport 15053 -m owner ${owner} ${SIDECAR_ID} -j CT --zone 2`,
	]),
	'PREROUTING -j ISTIO_INBOUND',
	'ISTIO_OUTPUT_DNS -p udp --dport 53 -j CT --zone 2',
	'ISTIO_INBOUND -p udp --sport 53 -j CT --zone 1',
];

export function sidecarRules(pod: Pod, options: SidecarOptions = {}, {dns = false}: {readonly dns?: boolean} = {}): void {
	pod.must('ip', '-6', 'addr', 'add', '::6/128', 'dev', 'lo', 'nodad');
	for (const family of FAMILIES) {
		restore(pod, family, {nat: sidecarNat(family, options, dns), ...dns ? {raw: SIDECAR_RAW} : {}});
	}
}
