/**
The options of `sidestep run` that say how to follow a cluster.
*/
import path from 'node:path';
import {InvalidArgumentError, Option, type Command} from 'commander';
import {BUILT_PLUGIN, DEFAULT_CNI_BIN, cniConfOption} from '../cni/command.js';
import {DEFAULT_CNI_TIMEOUT_SECONDS} from '../cni/install.js';
import {DEFAULT_CNI_SOCKET} from '../cni/server.js';
import {inClusterOptions} from '../kubernetes/client.js';
import {ISTIO_DEFAULTS} from '../redirect/annotations.js';
import type {KubernetesOptions} from './kubernetes.js';

export interface NodeCliOptions {
	readonly node?: string;
	readonly apiServer?: string;
	readonly tokenFile?: string;
	readonly caFile?: string;
	readonly excludeNamespaces: readonly string[];
	readonly ambientDns: boolean;
	readonly sidecarDns: boolean;
	readonly sidecarUid: number;
	readonly sidecarGid: number;
	readonly systemNamespace: string;
	readonly zdsSocket: string;
	readonly cni: boolean;
	readonly cniBin: string;
	readonly cniConf: string;
	readonly cniSocket: string;
	readonly cniTimeout: number;
}

/** Istio's own (CAPTURE.md, ZDS). */
const DEFAULT_ZDS_SOCKET = '/var/run/ztunnel/ztunnel.sock';
/** Left alone by Istio as well, unless told otherwise (cni chart, excludeNamespaces). */
const DEFAULT_EXCLUDED = ['kube-system'];

export function addNodeOptions(command: Command): Command {
	return command
		.addOption(new Option('--node <name>', 'follow the pods of this node of a cluster; the options from here on are about that').env('NODE_NAME'))
		.addOption(new Option('--api-server <url>', 'the API server (default: as a pod sees it)').env('SIDESTEP_API_SERVER'))
		.addOption(new Option('--token-file <file>', 'bearer token, read again when it changes').env('SIDESTEP_TOKEN_FILE'))
		.addOption(new Option('--ca-file <file>', 'authority of the API server\'s certificate').env('SIDESTEP_CA_FILE'))
		.addOption(new Option('--exclude-namespaces <names>', 'whose pods are left alone, separated by commas').env('SIDESTEP_EXCLUDE_NAMESPACES').argParser(names).default(DEFAULT_EXCLUDED, DEFAULT_EXCLUDED.join(',')))
		.addOption(new Option('--ambient-dns <on|off>', 'capture DNS of ambient pods that do not say').env('SIDESTEP_AMBIENT_DNS').argParser(onOff).default(ISTIO_DEFAULTS.ambientDns, 'on'))
		.addOption(new Option('--sidecar-dns <on|off>', 'capture DNS of sidecar pods that do not say').env('SIDESTEP_SIDECAR_DNS').argParser(onOff).default(ISTIO_DEFAULTS.sidecarDns, 'off'))
		.addOption(new Option('--sidecar-uid <number>', 'as whom sidecars run').env('SIDESTEP_SIDECAR_UID').argParser(id).default(ISTIO_DEFAULTS.sidecarUid))
		.addOption(new Option('--sidecar-gid <number>', 'with which group').env('SIDESTEP_SIDECAR_GID').argParser(id).default(ISTIO_DEFAULTS.sidecarGid))
		.addOption(new Option('--system-namespace <name>', 'where ztunnel is').env('SIDESTEP_SYSTEM_NAMESPACE').default(ISTIO_DEFAULTS.systemNamespace))
		.addOption(new Option('--zds-socket <path>', 'where ztunnel connects').env('SIDESTEP_ZDS_SOCKET').default(DEFAULT_ZDS_SOCKET))
		.option('--no-cni', 'do not hold pods\' starts: their first connections may not be captured')
		.addOption(new Option('--cni-bin <directory>', 'where the container runtime looks for plugins').env('SIDESTEP_CNI_BIN').default(DEFAULT_CNI_BIN))
		.addOption(cniConfOption())
		.addOption(new Option('--cni-socket <path>', 'where the CNI plugin calls').env('SIDESTEP_CNI_SOCKET').default(DEFAULT_CNI_SOCKET))
		.addOption(new Option('--cni-timeout <seconds>', 'how long a pod\'s start is held').env('SIDESTEP_CNI_TIMEOUT').argParser(seconds).default(DEFAULT_CNI_TIMEOUT_SECONDS));
}

/** @throws InputError outside of a cluster, without --api-server. */
export function kubernetesOptions(node: string, options: NodeCliOptions): KubernetesOptions {
	const {apiServer: server, tokenFile, caFile} = options;
	return {
		node,
		...(server === undefined ? inClusterOptions() : {server, tokenFile, caFile}),
		excludeNamespaces: options.excludeNamespaces,
		defaults: {
			ambientDns: options.ambientDns, sidecarDns: options.sidecarDns, sidecarUid: options.sidecarUid, sidecarGid: options.sidecarGid, systemNamespace: options.systemNamespace,
		},
		zdsSocket: options.zdsSocket,
		cni: options.cni ? {binary: BUILT_PLUGIN, binDir: path.resolve(options.cniBin), confDir: path.resolve(options.cniConf), socketPath: options.cniSocket, timeoutSeconds: options.cniTimeout, excludeNamespaces: options.excludeNamespaces} : undefined,
	};
}

function names(text: string): readonly string[] {
	return text.split(',').map(name => name.trim()).filter(Boolean);
}

function onOff(text: string): boolean {
	if (text !== 'on' && text !== 'off') {
		throw new InvalidArgumentError('Expected on or off.');
	}

	return text === 'on';
}

function id(text: string): number {
	return whole(text, 0, 0xff_ff_ff_fe);
}

/** As the plugin takes it. */
function seconds(text: string): number {
	return whole(text, 1, 600);
}

function whole(text: string, low: number, high: number): number {
	const value = Number(text);
	if (!/^\d+$/.test(text) || value < low || value > high) {
		throw new InvalidArgumentError(`Expected an integer from ${low} to ${high}.`);
	}

	return value;
}
