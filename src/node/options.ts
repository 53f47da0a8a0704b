/**
The options of `sidestep run` that say how to follow a cluster.
*/
import path from 'node:path';
import {InvalidArgumentError, Option, type Command} from 'commander';
import {integer} from '../arguments.js';
import {BUILT_PLUGIN, cniBinOption, cniConfOption, cniTimeoutOption} from '../cni/command.js';
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
/** The one above is no id (chown(2)). */
const UID_MAX = 0xff_ff_ff_fe;
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
		.addOption(new Option('--sidecar-uid <number>', 'as whom sidecars run').env('SIDESTEP_SIDECAR_UID').argParser(integer(0, UID_MAX)).default(ISTIO_DEFAULTS.sidecarUid))
		.addOption(new Option('--sidecar-gid <number>', 'with which group').env('SIDESTEP_SIDECAR_GID').argParser(integer(0, UID_MAX)).default(ISTIO_DEFAULTS.sidecarGid))
		.addOption(new Option('--system-namespace <name>', 'where ztunnel is').env('SIDESTEP_SYSTEM_NAMESPACE').default(ISTIO_DEFAULTS.systemNamespace))
		.addOption(new Option('--zds-socket <path>', 'where ztunnel connects').env('SIDESTEP_ZDS_SOCKET').default(DEFAULT_ZDS_SOCKET))
		.option('--no-cni', 'do not hold pods\' starts: their first connections may not be captured')
		.addOption(cniBinOption())
		.addOption(cniConfOption())
		.addOption(new Option('--cni-socket <path>', 'where the CNI plugin calls').env('SIDESTEP_CNI_SOCKET').default(DEFAULT_CNI_SOCKET))
		.addOption(cniTimeoutOption());
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
