/**
Hears from the CNI plugin (`cni/sidestep-cni.cc`), which the container runtime runs as a pod starts and ends: HTTP over a unix socket. The plugin holds
the pod's start until it is answered.

200: go on. 503: not now; the plugin asks again, whichever agent listens then, until its patience is over. Anything else fails the pod's start, with the
text as the reason.
*/
import {chmodSync, lstatSync, mkdirSync, renameSync, rmSync} from 'node:fs';
import {createServer, type IncomingMessage, type Server, type ServerResponse} from 'node:http';
import {connect, isIP} from 'node:net';
import path from 'node:path';
import {AgentError, HostError, InputError, hasErrno, reasonOf} from '../errors.js';
import {SocketFile} from '../socket-file.js';

/** Where the plugin looks when its configuration does not say. */
export const DEFAULT_CNI_SOCKET = '/var/run/sidestep/cni.sock';
/** It is bound under another name first. */
const TEMPORARY = '.new';
/** `sun_path` has room for 108 bytes, the last of which is zero. */
const MAX_SOCKET_PATH = 107 - TEMPORARY.length;
const MAX_BODY = 64 * 1024;
const MAX_TEXT = 4096;
const MAX_IPS = 64;
/** For a request to come in whole; the plugin sends it at once. */
const REQUEST_TIMEOUT_MS = 5000;

/** What the runtime says about a pod. Nothing of it but the shape is checked. */
export interface CniCall {
	/** As the host sees it, e.g. `/var/run/netns/cni-…`; empty only on DEL, for a namespace that is gone. */
	readonly netns: string;
	/** Runtimes other than Kubernetes' set it as well: podman says the container's name. */
	readonly podName: string;
	/** Empty when the runtime does not know of namespaces. */
	readonly podNamespace: string;
	/** Empty when the runtime does not tell. */
	readonly podUid: string;
	readonly containerId: string;
	/** Of the whole chain before the plugin; without prefix lengths. May be empty on DEL. */
	readonly ips: readonly string[];
}

export interface CniHandler {
	/**
	Resolves once the pod may start.

	@param signal - aborted when the plugin is gone (its patience is over, or the runtime's), and when the server closes.
	@throws CniRetry when it cannot be said yet; anything else fails the pod's start.
	*/
	add(call: CniCall, signal: AbortSignal): Promise<void>;
	/** Resolves when the pod is as `add` left it. */
	check(call: CniCall): Promise<void>;
	/** Resolves when the pod is forgotten; also for one that was never known. */
	del(call: CniCall): Promise<void>;
}

/** Not now: the plugin is to ask again. */
export class CniRetry extends AgentError {
	readonly code = 'ERR_CNI_RETRY';
}

export const CNI_COMMANDS = ['add', 'check', 'del'] as const;
export type CniCommand = typeof CNI_COMMANDS[number];
/** `gone`: the plugin did not wait for the answer. */
export type CniResult = 'ok' | 'failed' | 'retry' | 'gone';
export type CniCounters = Record<CniCommand, Record<CniResult, number>>;

const noCalls = (): Record<CniResult, number> => ({ok: 0, failed: 0, retry: 0, gone: 0});

export interface CniServerOptions {
	/** At most 103 bytes. Its directory is made if need be, for root only. */
	readonly socketPath: string;
	readonly log: (line: string) => void;
	readonly handler: CniHandler;
	/** Look this often whether the socket is still there. */
	readonly checkMs?: number;
}

export class CniServer {
	/** Calls since the start, by how they were answered. */
	readonly counters: CniCounters = {add: noCalls(), check: noCalls(), del: noCalls()};
	/** Requests that were no call: unknown path, no JSON, wrong types, too large. */
	refused = 0;
	readonly #options: CniServerOptions;
	readonly #file: SocketFile;
	readonly #inFlight = new Set<() => void>();
	/** Those of before a file was made again end when their last call is answered. */
	readonly #servers = new Set<Server>();
	#isClosed = false;

	constructor(options: CniServerOptions) {
		this.#options = options;
		const {socketPath: path, checkMs, log} = options;
		this.#file = new SocketFile({title: 'the CNI socket', path, checkMs, log, open: async () => this.#open()});
	}

	/** Why the plugin cannot reach us now. */
	get problem(): string | undefined {
		return this.#file.problem;
	}

	/** Calls that are being handled now. */
	get inFlight(): number {
		return this.#inFlight.size;
	}

	/**
	Listens; a socket that a dead agent left is replaced. One that disappears while we run is made again.

	@throws HostError when another process listens there, or the path is no socket or not to be had.
	*/
	async listen(): Promise<void> {
		const {socketPath} = this.#options;
		if (!path.isAbsolute(socketPath) || Buffer.byteLength(socketPath) > MAX_SOCKET_PATH) {
			throw new InputError('CNI socket', `expected an absolute path of at most ${MAX_SOCKET_PATH} bytes, got '${socketPath}'`);
		}

		await this.#open();
		this.#file.lookAfter();
	}

	/** Takes no more calls, and answers those in flight with 503, so that the plugin asks the next agent. Resolves when they have been answered. */
	async close(): Promise<void> {
		this.#isClosed = true;
		this.#file.close();
		this.#file.remove();
		const servers = [...this.#servers];
		const closed = Promise.all(servers.map(async server => new Promise(resolve => {
			server.close(resolve);
		})));
		for (const answerRetry of this.#inFlight) {
			answerRetry();
		}

		// A client that does not read its answer is not waited for.
		const late = setTimeout(() => {
			for (const server of servers) {
				server.closeAllConnections();
			}
		}, 1000);
		for (const server of servers) {
			server.closeIdleConnections();
		}

		await closed;
		clearTimeout(late);
	}

	/** Replaces what is at the path if it is a dead agent's socket, or our own of before. */
	async #open(): Promise<void> {
		const {socketPath} = this.#options;
		const temporary = socketPath + TEMPORARY;
		const server = createServer({requestTimeout: REQUEST_TIMEOUT_MS, headersTimeout: REQUEST_TIMEOUT_MS, connectionsCheckingInterval: 1000}, async (request, response) => this.#answer(request, response));
		try {
			mkdirSync(path.dirname(socketPath), {recursive: true, mode: 0o700});
			await requireNoRival(socketPath);
			rmSync(temporary, {force: true});
			await new Promise<void>((resolve, reject) => {
				server.once('error', reject);
				server.listen(temporary, resolve);
			});
			if (this.#isClosed) {
				server.close();
				return;
			}

			chmodSync(temporary, 0o600);
			// A server's close removes the name that it was bound to, whosever file has it by then; so that is one that nobody else uses.
			renameSync(temporary, socketPath);
		} catch (error) {
			server.close();
			throw error instanceof AgentError ? error : new HostError(`the CNI socket ${socketPath} cannot be listened on (${reasonOf(error)})`, 'choose another place for it, or mount a directory there that can be written (again, if it was made anew on the host)', {cause: error});
		}

		for (const former of this.#servers) {
			former.close();
		}

		this.#servers.add(server);
		server.once('close', () => {
			this.#servers.delete(server);
		});
	}

	async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
		const say = (status: number, text: string) => {
			if (!response.headersSent) {
				response.writeHead(status, {'content-type': 'text/plain; charset=utf-8', connection: 'close'}).end(text);
			}
		};

		const command = CNI_COMMANDS.find(name => request.url === `/cmd${name}`);
		let call: CniCall;
		try {
			if (!command || request.method !== 'POST') {
				throw new InputError('request', `expected POST to ${CNI_COMMANDS.map(name => `/cmd${name}`).join(', ')}, got ${request.method} ${request.url}`);
			}

			call = parseCniCall(await readBody(request), command);
		} catch (error) {
			this.refused++;
			this.#options.log(`a CNI request was refused: ${reasonOf(error)}`);
			say(400, reasonOf(error));
			return;
		}

		const abort = new AbortController();
		const count = (result: CniResult) => {
			this.counters[command][result]++;
		};

		let isAnswered = false;
		const once = (result: CniResult, status: number, text: string) => {
			if (!isAnswered) {
				isAnswered = true;
				count(result);
				this.#inFlight.delete(answerRetry);
				say(status, text);
			}
		};

		const answerRetry = () => {
			once('retry', 503, 'the agent is stopping');
			abort.abort();
		};

		this.#inFlight.add(answerRetry);
		response.once('close', () => {
			once('gone', 503, '');
			abort.abort();
		});
		if (this.#isClosed) {
			answerRetry();
			return;
		}

		try {
			await this.#options.handler[command](call, abort.signal);
			once('ok', 200, '');
		} catch (error) {
			const who = `${command.toUpperCase()} of ${call.podNamespace}/${call.podName}`;
			if (isAnswered) {
				return;
			}

			if (error instanceof CniRetry) {
				once('retry', 503, error.message);
			} else {
				this.#options.log(`CNI ${who} failed: ${reasonOf(error)}`);
				once('failed', 500, reasonOf(error));
			}
		}
	}
}

/**
@throws InputError naming the first value that is not as it should be. Keys that are not known are left alone: plugin and agent may be of two versions.
*/
export function parseCniCall(body: string, command: CniCommand): CniCall {
	let value: unknown;
	try {
		value = JSON.parse(body);
	} catch (error) {
		throw new InputError('body', `expected JSON (${reasonOf(error)})`, {cause: error});
	}

	if (typeof value !== 'object' || value === null || Array.isArray(value)) {
		throw new InputError('body', 'expected an object');
	}

	const fields = value as Record<string, unknown>;
	const text = (key: string, isRequired: boolean) => {
		const field = fields[key];
		// A zero byte would cut a path short where it is used.
		if (typeof field !== 'string' || field.length > MAX_TEXT || field.includes('\0') || (isRequired && field === '')) {
			throw new InputError(`body: ${key}`, `expected ${isRequired ? 'text' : 'text, or an empty one,'} of at most ${MAX_TEXT} characters, got ${describe(field)}`);
		}

		return field;
	};

	const netns = text('Netns', command !== 'del');
	if (netns !== '' && !path.isAbsolute(netns)) {
		throw new InputError('body: Netns', `expected an absolute path, got ${describe(netns)}`);
	}

	const ips = fields['IPs'];
	if (!Array.isArray(ips) || ips.length > MAX_IPS || !ips.every((ip): ip is string => typeof ip === 'string' && isIP(ip) !== 0)) {
		throw new InputError('body: IPs', `expected a list of at most ${MAX_IPS} addresses, got ${describe(ips)}`);
	}

	return {netns, podName: text('PodName', true), podNamespace: text('PodNamespace', false), podUid: text('PodUid', false), containerId: text('ContainerId', true), ips};
}

const describe = (value: unknown) => value === undefined ? 'nothing' : JSON.stringify(value).slice(0, 80);

async function readBody(request: IncomingMessage): Promise<string> {
	const tooLong = new InputError('body', `more than ${MAX_BODY} bytes`);
	// Leaving the loop below ends the connection, without an answer.
	if (Number(request.headers['content-length']) > MAX_BODY) {
		throw tooLong;
	}

	const chunks: Buffer[] = [];
	let length = 0;
	for await (const chunk of request as AsyncIterable<Buffer>) {
		length += chunk.length;
		if (length > MAX_BODY) {
			throw tooLong;
		}

		chunks.push(chunk);
	}

	return Buffer.concat(chunks).toString();
}

/** Nobody listens on a socket that refuses to be connected to; a plain file refuses as well. */
async function requireNoRival(socketPath: string): Promise<void> {
	const stat = lstatSync(socketPath, {throwIfNoEntry: false});
	if (!stat) {
		return;
	}

	if (!stat.isSocket()) {
		throw new HostError(`${socketPath} is there and no socket`, 'remove it, or choose another place for the CNI socket');
	}

	const refusal = await new Promise<Error | undefined>(resolve => {
		const client = connect(socketPath, () => {
			client.destroy();
			resolve(undefined);
		});
		client.once('error', resolve);
	});
	if (!refusal) {
		throw new HostError(`another process listens on the CNI socket ${socketPath}`, 'stop that agent first');
	}

	if (!hasErrno(refusal, 'ECONNREFUSED', 'ENOENT')) {
		throw refusal;
	}
}
