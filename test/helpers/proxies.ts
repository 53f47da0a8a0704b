/** Real transparent proxies, in a pod. */
import {mkdirSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {PROXY_MARK, PROXY_PORT, PROXY_UID} from './capture.js';
import {eventually, type Running} from './process.js';
import {ENVOY, type Pod} from './world.js';

function file(pod: Pod, name: string, text: string): string {
	const full = path.join(pod.world.directory, `${pod.name}-${name}`);
	writeFileSync(full, text);
	return full;
}

async function listening(pod: Pod, port: number, running: Running): Promise<void> {
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
