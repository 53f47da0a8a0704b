/** Runs the CNI plugin as a container runtime does. */
import {mkdtempSync, rmSync} from 'node:fs';
import {createServer as createHttpServer, type IncomingMessage, type ServerResponse} from 'node:http';
import type {Server} from 'node:net';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {spawn} from 'node:child_process';
import {BUILT_PLUGIN} from '../../src/cni/command.js';

export interface Teardown {
	teardown(clean: () => void | Promise<void>): void;
}

export interface PluginResult {
	readonly code: number | null;
	readonly stdout: string;
	readonly stderr: string;
	readonly ms: number;
	/** Of CNI's error format; undefined when stdout is not such. */
	readonly error: {readonly cniVersion: string; readonly code: number; readonly msg: string; readonly details: string} | undefined;
}

export const POD_ARGS = 'IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c0ffee;K8S_POD_UID=4c1f-77';
export const ENVIRONMENT = {CNI_COMMAND: 'ADD', CNI_CONTAINERID: 'c0ffee', CNI_NETNS: '/var/run/netns/cni-1', CNI_IFNAME: 'eth0', CNI_PATH: '/opt/cni/bin', CNI_ARGS: POD_ARGS};
/** As written by somebody with habits: escapes, spaces, numbers that a double does not hold. */
export const PREVIOUS = '{ "cniVersion":"1.0.0",\t"interfaces":[{"name":"eth0","sandbox":"\\/var\\/run\\/netns\\/cni-1"}],\n"ips":[{"address":"10.88.0.5/16","gateway":"10.88.0.1","interface":0},'
	+ '{"address":"fd00::5/64"}], "x":12345678901234567890123, "y":1.50, "z":"\\u00e9}", "y":{"prevResult":{}} }';
export const CALL = {Netns: '/var/run/netns/cni-1', PodName: 'web-0', PodNamespace: 'shop', PodUid: '4c1f-77', ContainerId: 'c0ffee', IPs: ['10.88.0.5', 'fd00::5']};

export function directory(t: Teardown): string {
	const made = mkdtempSync(path.join(tmpdir(), 'sst-cni-'));
	t.teardown(() => {
		rmSync(made, {recursive: true, force: true});
	});
	return made;
}

export function netconf(socket: string, extra = '"timeoutSeconds":10', previous: string | null = PREVIOUS): string {
	return `{"cniVersion":"1.0.0","name":"pods","type":"sidestep-cni","socket":${JSON.stringify(socket)}${extra && `,${extra}`}${previous === null ? '' : `,"prevResult":${previous}`}}`;
}

/** @param onStderr - called with all that it has said so far. */
export async function plugin(input: string | Buffer, environment: Readonly<Record<string, string | undefined>> = {}, onStderr?: (stderr: string) => void): Promise<PluginResult> {
	const started = performance.now();
	const env = Object.fromEntries(Object.entries({...ENVIRONMENT, ...environment}).filter(([, value]) => value !== undefined));
	const child = spawn(BUILT_PLUGIN, [], {env, stdio: ['pipe', 'pipe', 'pipe']});
	let stdout = '';
	let stderr = '';
	child.stdout.setEncoding('utf8').on('data', (text: string) => {
		stdout += text;
	});
	child.stderr.setEncoding('utf8').on('data', (text: string) => {
		stderr += text;
		onStderr?.(stderr);
	});
	// It may end before it has read all.
	child.stdin.on('error', () => undefined);
	child.stdin.end(input);
	const code = await new Promise<number | null>((resolve, reject) => {
		child.once('error', reject);
		child.once('close', resolve);
	});
	let error: PluginResult['error'];
	try {
		const value = JSON.parse(stdout) as PluginResult['error'];
		error = typeof value?.code === 'number' ? value : undefined;
	} catch {}

	return {code, stdout, stderr, ms: performance.now() - started, error};
}

export async function listen(t: Teardown, server: Server, socket: string): Promise<void> {
	await new Promise<void>((resolve, reject) => {
		server.once('error', reject);
		server.listen(socket, resolve);
	});
	t.teardown(() => {
		server.close();
	});
}

/** An agent of few words. */
export async function httpAgent(t: Teardown, socket: string, answer: (request: IncomingMessage, body: string, response: ServerResponse) => void): Promise<void> {
	await listen(t, createHttpServer(async (request, response) => {
		let body = '';
		for await (const chunk of request.setEncoding('utf8') as AsyncIterable<string>) {
			body += chunk;
		}

		answer(request, body, response);
	}), socket);
}
