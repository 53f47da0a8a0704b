/** Real transparent proxies, in a pod. */
import {chownSync, constants, copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import {PROXY_MARK, PROXY_PORT, PROXY_UID} from './capture.js';
import {SIDECAR_ID} from './istio-rules.js';
import {eventually, type Running} from './process.js';
import {ENVOY, type Pod} from './world.js';

function file(pod: Pod, name: string, text: string): string {
	const full = path.join(pod.world.directory, `${pod.name}-${name}`);
	writeFileSync(full, text);
	return full;
}

export async function listening(pod: Pod, port: number, running: Running): Promise<void> {
	await eventually(`port ${port} is listened on\n${running.stderr}`, () => {
		if (running.hasEnded) {
			throw new Error(`${running.title} ended: ${running.stderr}${running.stdout}`);
		}

		return pod.must('ss', '-Htln').includes(`:${port} `);
	});
}

/** Reads SO_ORIGINAL_DST by itself when the server's address is 0.0.0.0. Exempt by its uid. */
export async function startHaproxy(pod: Pod): Promise<Running> {
	const config = file(pod, 'haproxy.cfg', `
global
	maxconn 512
	log stdout format raw local0
defaults
	mode tcp
	timeout connect 3s
	timeout client 30s
	timeout server 30s
	log global
	option tcplog
listen capture
	bind 0.0.0.0:${PROXY_PORT}
	server original 0.0.0.0
`);
	const running = pod.start(['haproxy', '-db', '-f', config], {uid: PROXY_UID});
	await listening(pod, PROXY_PORT, running);
	return running;
}

/** redsocks asks for SO_ORIGINAL_DST and talks SOCKS5 to microsocks, which connects. Both exempt by their uid. */
export async function startRedsocks(pod: Pod): Promise<Running> {
	const config = file(pod, 'redsocks.conf', `
base { log_info = on; log = stderr; daemon = off; redirector = iptables; }
redsocks { local_ip = 0.0.0.0; local_port = ${PROXY_PORT}; ip = 127.0.0.1; port = 1080; type = socks5; }
`);
	const socks = pod.start(['microsocks', '-i', '127.0.0.1', '-p', '1080'], {uid: PROXY_UID});
	const running = pod.start(['redsocks', '-c', config], {uid: PROXY_UID});
	await listening(pod, 1080, socks);
	await listening(pod, PROXY_PORT, running);
	return running;
}

/** The original_dst listener filter and cluster; exempt by the mark on its upstream sockets. */
export async function startEnvoy(pod: Pod): Promise<{readonly running: Running; readonly log: string}> {
	const log = path.join(pod.world.directory, `${pod.name}-envoy.log`);
	const directory = path.join(pod.world.directory, `${pod.name}-envoy`);
	mkdirSync(directory);
	const config = file(pod, 'envoy.json', JSON.stringify({
		static_resources: {
			listeners: [{
				name: 'capture',
				address: {socket_address: {address: '::', port_value: PROXY_PORT, ipv4_compat: true}},
				listener_filters: [{name: 'envoy.filters.listener.original_dst', typed_config: {'@type': 'type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst'}}],
				filter_chains: [{filters: [{
					name: 'envoy.filters.network.tcp_proxy',
					typed_config: {
						'@type': 'type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy',
						stat_prefix: 'capture',
						cluster: 'original',
						access_log: [{
							name: 'envoy.access_loggers.file',
							typed_config: {
								'@type': 'type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog', path: log,
								log_format: {text_format_source: {inline_string: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_HOST%\n'}},
							},
						}],
					},
				}]}],
			}],
			clusters: [{
				name: 'original',
				type: 'ORIGINAL_DST',
				lb_policy: 'CLUSTER_PROVIDED',
				connect_timeout: '3s',
				upstream_bind_config: {socket_options: [{level: 1, name: 36, int_value: PROXY_MARK, state: 'STATE_PREBIND', description: 'SO_MARK'}]},
			}],
		},
	}));
	const running = pod.start([ENVOY, '-c', config, '--concurrency', '1', '--log-level', 'warning', '--disable-hot-restart']);
	await listening(pod, PROXY_PORT, running);
	return {running, log};
}

/** A line of a sidecar's access log, in which ports are as they were. */
export interface SidecarLine {
	/** The filter chain that took the connection. */
	readonly chain: 'outbound' | 'outbound-blackhole' | 'service' | 'inbound-ipv4' | 'inbound-ipv6' | 'inbound-blackhole';
	/** The accepted socket's own address, before the original destination took its place. */
	readonly accepted: string;
	readonly peer: string;
	readonly destination: string;
	readonly upstream: string | null;
	readonly source: string | null;
	readonly flags: string;
	readonly failure: string | null;
	readonly received: number;
	readonly sent: number;
}

export interface Sidecar {
	readonly running: Running;
	/** The next lines of its log; fewer than `count` when they do not come. */
	readonly lines: (count: number) => Promise<SidecarLine[]>;
}

/** Of a service whose only endpoint is the pod itself, at port 8081. */
export const SERVICE = {4: '10.96.0.1', 6: 'fd96::1', port: 80} as const;

/** Each listens for itself, once a family: together more often than LISTENER_SLOTS has room for. */
const SIDECAR_WORKERS = 20;
const LINES_WITHIN_MS = 3000;
const FLUSH_MS = 20;

const socketAddress = (address: string, port: number) => ({socket_address: {address, port_value: port}});
const bothFamilies = (port: number) => ({address: socketAddress('0.0.0.0', port), additional_addresses: [{address: socketAddress('::', port)}]});

function sidecarConfig(pod: Pod, log: string): object {
	const chain = (name: SidecarLine['chain'], cluster: string, match?: object) => ({
		name,
		...match ? {filter_chain_match: match} : {},
		filters: [{
			name: 'envoy.filters.network.tcp_proxy',
			typed_config: {
				'@type': 'type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy',
				stat_prefix: name,
				cluster,
				access_log: [{
					name: 'envoy.access_loggers.file',
					typed_config: {
						'@type': 'type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog', path: log,
						log_format: {json_format: {
							chain: '%FILTER_CHAIN_NAME%', accepted: '%DOWNSTREAM_DIRECT_LOCAL_ADDRESS%',
							peer: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%', destination: '%DOWNSTREAM_LOCAL_ADDRESS%',
							upstream: '%UPSTREAM_HOST%', source: '%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%',
							flags: '%RESPONSE_FLAGS%', failure: '%UPSTREAM_TRANSPORT_FAILURE_REASON%', received: '%BYTES_RECEIVED%', sent: '%BYTES_SENT%',
						}},
					},
				}],
			},
		}],
	});
	const prefix = (address: string) => ({prefix_ranges: [{address_prefix: address, prefix_len: 0}]});
	const passthrough = (name: string, source?: string) => ({
		name, type: 'ORIGINAL_DST', lb_policy: 'CLUSTER_PROVIDED', connect_timeout: '3s',
		...source ? {upstream_bind_config: {source_address: {address: source, port_value: 0}}} : {},
	});
	const service = (address: string, own: string) => ({
		listener: {name: `service ${address}`, address: socketAddress(address, SERVICE.port), bind_to_port: false, filter_chains: [chain('service', `service ${address}`)]},
		cluster: {
			name: `service ${address}`, type: 'STATIC', connect_timeout: '3s',
			load_assignment: {cluster_name: `service ${address}`, endpoints: [{lb_endpoints: [{endpoint: {address: socketAddress(own, 8081)}}]}]},
		},
	});
	const services = [service(SERVICE[4], pod.ipv4), service(SERVICE[6], pod.ipv6)];
	return {
		static_resources: {
			listeners: [
				{
					name: 'virtualOutbound', ...bothFamilies(15_001), use_original_dst: true, traffic_direction: 'OUTBOUND',
					filter_chains: [chain('outbound-blackhole', 'BlackHoleCluster', {destination_port: 15_001}), chain('outbound', 'PassthroughCluster')],
				},
				{
					name: 'virtualInbound', ...bothFamilies(15_006), traffic_direction: 'INBOUND',
					listener_filters: [{name: 'envoy.filters.listener.original_dst', typed_config: {'@type': 'type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst'}}],
					filter_chains: [
						chain('inbound-blackhole', 'BlackHoleCluster', {destination_port: 15_006}),
						chain('inbound-ipv4', 'InboundPassthroughClusterIpv4', prefix('0.0.0.0')),
						chain('inbound-ipv6', 'InboundPassthroughClusterIpv6', prefix('::0')),
					],
				},
				...services.map(({listener}) => listener),
			],
			clusters: [
				{name: 'BlackHoleCluster', type: 'STATIC', connect_timeout: '3s'},
				passthrough('PassthroughCluster'),
				passthrough('InboundPassthroughClusterIpv4', '127.0.0.6'),
				passthrough('InboundPassthroughClusterIpv6', '::6'),
				...services.map(({cluster}) => cluster),
			],
		},
	};
}

/**
Envoy as Istio configures it (pilot/pkg/networking/core), except that each family has a passthrough cluster of its own; as an ordinary user, exempt by its uid
and gid.
*/
export async function startEnvoySidecar(pod: Pod): Promise<Sidecar> {
	// Not beside the pods file, where each line of the log would wake the agent.
	const directory = path.join(pod.world.directory, `${pod.name}-sidecar`);
	mkdirSync(directory);
	chownSync(directory, SIDECAR_ID, SIDECAR_ID);
	const log = path.join(directory, 'access.log');
	const config = path.join(directory, 'envoy.json');
	writeFileSync(config, JSON.stringify(sidecarConfig(pod, log)));
	// The tree may be closed to another user.
	const envoy = path.join(pod.world.directory, 'envoy');
	if (!existsSync(envoy)) {
		copyFileSync(ENVOY, envoy, constants.COPYFILE_FICLONE);
	}

	const running = pod.start([envoy, '-c', config, '--concurrency', String(SIDECAR_WORKERS), '--file-flush-interval-msec', String(FLUSH_MS), '--log-level', 'warning', '--disable-hot-restart'], {uid: SIDECAR_ID, gid: SIDECAR_ID});
	await listening(pod, 15_001, running);
	await listening(pod, 15_006, running);
	let taken = 0;
	return {
		running,
		lines: async count => {
			const deadline = Date.now() + LINES_WITHIN_MS;
			for (;;) {
				const lines = readFileSync(log, 'utf8').split('\n').slice(taken, -1);
				if (lines.length >= count || Date.now() > deadline) {
					taken += lines.length;
					return lines.map(line => JSON.parse(line) as SidecarLine);
				}

				await sleep(FLUSH_MS / 2);
			}
		},
	};
}
