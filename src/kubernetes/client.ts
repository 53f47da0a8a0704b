/**
HTTP requests to a Kubernetes API server: token and authority of the service account, time-outs, bounded answers, watches as streams of events.
*/
import {Buffer} from 'node:buffer';
import http from 'node:http';
import https from 'node:https';
import path from 'node:path';
import {InputError, hasErrno, reasonOf} from '../errors.js';
import {Credentials, type CredentialFiles} from './credentials.js';
import {
	KubernetesConnectionError, KubernetesError, KubernetesProtocolError, KubernetesStatusError, KubernetesTimeoutError, describeRequest,
} from './errors.js';
import {LineSplitter} from './lines.js';
import {Pace} from './pace.js';

export interface ClientOptions extends CredentialFiles {
	/** `https://10.96.0.1:443`; `http:` for kubectl proxy and tests. A path is put before each request's. */
	readonly server: string;
	readonly log: (line: string) => void;
	readonly timing?: Partial<ClientTiming>;
}

/** All in ms. */
export interface ClientTiming {
	/** For a whole answer, and for the head of a watch's. @default 30,000 */
	readonly requestMs: number;
	/** Token and authority are read again after this. @default 60,000 */
	readonly credentialsMs: number;
	/** Least time between two requests to a server that fails. @default 1,000 */
	readonly gapMs: number;
	/** The longest back-off, and the most that Retry-After can ask for. @default 30,000 */
	readonly maxBackoffMs: number;
}

export const CLIENT_TIMING: ClientTiming = {requestMs: 30_000, credentialsMs: 60_000, gapMs: 1000, maxBackoffMs: 30_000};

export interface RequestOptions {
	readonly signal?: AbortSignal;
	/** @default {@link ClientTiming.requestMs} */
	readonly timeoutMs?: number;
}

export interface WatchOptions {
	readonly signal: AbortSignal;
	/** The connection counts as dead when no whole event came for so long. */
	readonly inactivityMs: number;
	/** The server has agreed; events follow. */
	readonly onOpen?: () => void;
}

/** One event of a watch, as it came. `object` is what the server says it is: trust nothing in it. */
export interface WatchEvent {
	readonly type: string;
	readonly object: unknown;
}

interface Exchange {
	readonly method: string;
	/** Path with query. */
	readonly target: string;
	readonly body?: unknown;
	readonly contentType?: string;
}

const SERVICE_ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount';
const MAX_RESPONSE_BYTES = 32 << 20;
const MAX_LINE_BYTES = 8 << 20;
const MAX_ERROR_BYTES = 64 << 10;
const MAX_DETAIL = 300;
/** Less than any server or balancer keeps an idle connection. */
const IDLE_SOCKET_MS = 20_000;
const MAX_IDLE_SOCKETS = 4;
/** The source under which single requests count in {@link Pace}. */
const SINGLE = 'single';
export const MERGE_PATCH = 'application/merge-patch+json';

/**
Where the API server is, and the agent's credentials, for a process in a pod.

@throws InputError outside of one.
*/
export function inClusterOptions(env: Readonly<Record<string, string | undefined>> = process.env, directory = SERVICE_ACCOUNT): {readonly server: string; readonly tokenFile: string; readonly caFile: string} {
	const {KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port = '443'} = env;
	if (!host) {
		throw new InputError('KUBERNETES_SERVICE_HOST', 'it is not set, so this is not a pod: give --api-server, --token-file and --ca-file');
	}

	return {server: `https://${host.includes(':') ? `[${host}]` : host}:${port}`, tokenFile: path.join(directory, 'token'), caFile: path.join(directory, 'ca.crt')};
}

export class KubernetesClient {
	readonly timing: ClientTiming;
	/** Loops that repeat requests tell it how they fare; single requests do so by themselves. */
	readonly pace: Pace;
	/** Requests sent, retries and watches among them. */
	requests = 0;
	readonly #server: URL;
	readonly #credentials: Credentials;
	readonly #agent: http.Agent;

	/** @throws InputError for a `server` that is none. */
	constructor(readonly options: ClientOptions) {
		this.#server = parseServer(options.server);
		this.timing = {...CLIENT_TIMING, ...options.timing};
		const {gapMs, maxBackoffMs, requestMs, credentialsMs} = this.timing;
		this.pace = new Pace({gapMs, maxWaitMs: maxBackoffMs, forgetMs: maxBackoffMs + 2 * requestMs});
		this.#credentials = new Credentials(options, credentialsMs, options.log);
		const agentOptions = {keepAlive: true, maxFreeSockets: MAX_IDLE_SOCKETS, timeout: IDLE_SOCKET_MS, scheduling: 'lifo' as const};
		this.#agent = this.#server.protocol === 'https:' ? new https.Agent(agentOptions) : new http.Agent(agentOptions);
	}

	/**
	@param target - path with query, e.g. `/api/v1/namespaces/shop/pods/web-0`.
	@returns the object, parsed.
	@throws KubernetesError; `signal.reason` when aborted.
	*/
	async get(target: string, options: RequestOptions = {}): Promise<unknown> {
		try {
			const answer = await this.request({method: 'GET', target}, options);
			this.pace.recovered(SINGLE);
			return answer;
		} catch (error) {
			if (error instanceof KubernetesError && error.isServerFailure) {
				this.pace.failed(SINGLE);
			}

			throw error;
		}
	}

	/** @throws as {@link get}. */
	async patch(target: string, body: unknown, contentType: string = MERGE_PATCH, options: RequestOptions = {}): Promise<unknown> {
		return this.request({method: 'PATCH', target, body, contentType}, options);
	}

	/** @throws as {@link get}. */
	async post(target: string, body: unknown, options: RequestOptions = {}): Promise<unknown> {
		return this.request({method: 'POST', target, body, contentType: 'application/json'}, options);
	}

	/** For loops: does not tell {@link pace} whether it failed. @throws as {@link get}. */
	async request(exchange: Exchange, {signal, timeoutMs = this.timing.requestMs}: RequestOptions = {}): Promise<unknown> {
		const what = describeRequest(exchange.method, exchange.target);
		return this.#twice(exchange, signal, async () => {
			using answer = await this.#open(exchange, what, signal, timeoutMs);
			const text = await answer.text(MAX_RESPONSE_BYTES);
			try {
				return JSON.parse(text) as unknown;
			} catch (error) {
				throw new KubernetesProtocolError(what, `its answer is not JSON: ${shorten(text)}`, {cause: error});
			}
		});
	}

	/**
	Calls `onEvent` for each event, in order. Resolves when the server ends the answer between two events.

	For loops: does not tell {@link pace} whether it failed.

	@param target - path with query, `watch=1` in it.
	@throws as {@link get}; what `onEvent` throws.
	*/
	async watch(target: string, onEvent: (event: WatchEvent) => void, {signal, inactivityMs, onOpen}: WatchOptions): Promise<void> {
		const exchange = {method: 'GET', target};
		const what = describeRequest('GET', target);
		using answer = await this.#twice(exchange, signal, async () => this.#open(exchange, what, signal, this.timing.requestMs));
		onOpen?.();
		answer.allow(inactivityMs);
		const lines = new LineSplitter(MAX_LINE_BYTES);
		for await (const chunk of answer.chunks()) {
			for (const line of splitLines(lines, chunk, what)) {
				answer.allow(inactivityMs);
				onEvent(parseEvent(line, what));
			}
		}

		if (lines.pendingBytes > 0) {
			throw new KubernetesProtocolError(what, `its answer ends within an event, after ${lines.pendingBytes} bytes of it`);
		}
	}

	/** Ends idle connections. The client can go on being used. */
	close(): void {
		for (const sockets of Object.values(this.#agent.freeSockets)) {
			for (const socket of sockets ?? []) {
				socket.destroy();
			}
		}
	}

	/** A second time at once where the first one failed for a reason that is gone: old credentials, an idle connection that the server had ended. */
	async #twice<R>({method}: Exchange, signal: AbortSignal | undefined, act: () => Promise<R>): Promise<R> {
		try {
			return await act();
		} catch (error) {
			if (signal?.aborted) {
				throw error;
			}

			const isOutdated = (error instanceof KubernetesStatusError && error.status === 401) || (error instanceof KubernetesConnectionError && error.isUntrusted);
			const isStale = error instanceof KubernetesConnectionError && WAS_IDLE in error.cause && method !== 'POST';
			if (isStale || (isOutdated && this.#credentials.reread())) {
				return act();
			}

			throw error;
		}
	}

	/** Resolves with a 2xx answer whose body is yet to be read. */
	async #open({method, target, body, contentType}: Exchange, what: string, signal: AbortSignal | undefined, timeoutMs: number): Promise<Answer> {
		await this.pace.admit(signal);
		const {token, ca} = this.#credentials.get();
		const payload = body === undefined ? undefined : JSON.stringify(body);
		this.requests++;
		const answer = new Answer(what, this.#server.origin, this.options.caFile, signal);
		try {
			answer.allow(timeoutMs);
			const request = (this.#server.protocol === 'https:' ? https : http).request(this.#server, {
				method,
				path: this.#server.pathname.replace(/\/$/, '') + target,
				agent: this.#agent,
				// Part of what the agent tells connections apart by: a new authority gets new connections.
				...(ca === undefined ? {} : {ca}),
				headers: {
					accept: 'application/json',
					'user-agent': 'sidestep',
					...(token === undefined ? {} : {authorization: `Bearer ${token}`}),
					...(payload === undefined ? {} : {'content-type': contentType}),
				},
			});
			const response = await answer.head(request, payload);
			this.pace.answered();
			const {statusCode: status = 0} = response;
			if (status < 200 || status > 299) {
				throw await this.#refusal(answer, status, what, response.headers['retry-after']);
			}

			return answer;
		} catch (error) {
			answer[Symbol.dispose]();
			throw error;
		}
	}

	async #refusal(answer: Answer, status: number, what: string, retryAfter: string | undefined): Promise<KubernetesStatusError> {
		const text = await answer.text(MAX_ERROR_BYTES).catch(() => '');
		const seconds = Number(retryAfter);
		const retryAfterMs = retryAfter !== undefined && seconds > 0 ? seconds * 1000 : undefined;
		if (retryAfterMs !== undefined) {
			this.pace.waitFor(retryAfterMs);
		}

		let object: unknown;
		try {
			object = JSON.parse(text);
		} catch {
			return new KubernetesStatusError(what, status, http.STATUS_CODES[status] ?? '', shorten(text), retryAfterMs);
		}

		return statusError(what, object, status, retryAfterMs);
	}
}

/** @param object - a Status object, if the server is right. */
export function statusError(what: string, object: unknown, status?: number, retryAfterMs?: number): KubernetesStatusError {
	const {code, reason, message} = (typeof object === 'object' && object !== null ? object : {}) as Record<string, unknown>;
	const text = (value: unknown) => typeof value === 'string' ? shorten(value) : '';
	return new KubernetesStatusError(what, status ?? (typeof code === 'number' ? code : 500), text(reason), text(message), retryAfterMs);
}

/** Set on the cause of a connection error when the connection had been idle before: the server may have ended it meanwhile. */
const WAS_IDLE = Symbol('was idle');

/** One request on its way, and its answer: one time-out, one signal, one end, whatever state it is in. */
class Answer {
	#target: {destroy(error?: Error): unknown; readonly destroyed: boolean} | undefined;
	#response: http.IncomingMessage | undefined;
	#request: http.ClientRequest | undefined;
	/** Why we ended it ourselves. */
	#reason: Error | undefined;
	#timer: NodeJS.Timeout | undefined;
	#timeoutMs = 0;

	constructor(readonly what: string, readonly server: string, readonly caFile: string | undefined, readonly signal: AbortSignal | undefined) {
		signal?.addEventListener('abort', this.#abort, {once: true});
	}

	/** Ends it if it is not allowed more time, or disposed of, within `ms` from now. */
	allow(ms: number): void {
		if (ms === this.#timeoutMs) {
			this.#timer!.refresh();
			return;
		}

		clearTimeout(this.#timer);
		this.#timeoutMs = ms;
		this.#timer = setTimeout(() => {
			this.#end(new KubernetesTimeoutError(this.what, ms));
		}, ms);
	}

	async head(request: http.ClientRequest, payload: string | undefined): Promise<http.IncomingMessage> {
		this.#request = request;
		this.#target = request;
		try {
			this.#response = await new Promise<http.IncomingMessage>((resolve, reject) => {
				// Stays for good: a request can fail again after its answer began.
				request.on('error', reject);
				request.once('response', resolve);
				request.end(payload);
				if (this.signal?.aborted) {
					this.#abort();
				}
			});
		} catch (error) {
			throw this.#explain(error as Error);
		}

		this.#response.on('error', () => {});
		this.#target = this.#response;
		return this.#response;
	}

	async * chunks(): AsyncGenerator<Buffer, void, undefined> {
		try {
			for await (const chunk of this.#response!) {
				yield chunk as Buffer;
			}
		} catch (error) {
			throw this.#explain(error as Error);
		}
	}

	async text(maxBytes: number): Promise<string> {
		const pieces: Buffer[] = [];
		let length = 0;
		for await (const chunk of this.chunks()) {
			length += chunk.length;
			if (length > maxBytes) {
				throw new KubernetesProtocolError(this.what, `its answer is longer than ${maxBytes} bytes`);
			}

			pieces.push(chunk);
		}

		return Buffer.concat(pieces).toString();
	}

	[Symbol.dispose](): void {
		clearTimeout(this.#timer);
		this.signal?.removeEventListener('abort', this.#abort);
		// A body that was read to its end leaves the connection to the next request.
		if (!this.#response?.complete) {
			this.#request?.destroy();
			this.#response?.destroy();
		}
	}

	readonly #abort = (): void => {
		this.#end(this.signal!.reason as Error);
	};

	#end(reason: Error): void {
		this.#reason ??= reason;
		this.#target?.destroy(reason instanceof Error ? reason : new Error(String(reason)));
	}

	#explain(error: Error): Error {
		if (this.#reason !== undefined) {
			return this.#reason;
		}

		if (this.#response === undefined && this.#request?.reusedSocket && hasErrno(error, 'ECONNRESET', 'EPIPE')) {
			Object.assign(error, {[WAS_IDLE]: true});
		}

		return new KubernetesConnectionError(this.server, error, {caFile: this.caFile});
	}
}

function parseServer(text: string): URL {
	let url: URL | undefined;
	try {
		url = new URL(text);
	} catch {
		// Said below.
	}

	if (!url || !/^https?:$/.test(url.protocol) || url.search || url.hash || url.username) {
		throw new InputError('--api-server', `expected an address such as https://10.96.0.1:443, got '${text}'`);
	}

	return url;
}

function * splitLines(lines: LineSplitter, chunk: Buffer, what: string): Generator<string, void, undefined> {
	const iterator = lines.push(chunk);
	for (;;) {
		let next: IteratorResult<string, void>;
		try {
			next = iterator.next();
		} catch (error) {
			throw new KubernetesProtocolError(what, reasonOf(error), {cause: error});
		}

		if (next.done) {
			return;
		}

		yield next.value;
	}
}

function parseEvent(line: string, what: string): WatchEvent {
	let event: unknown;
	try {
		event = JSON.parse(line);
	} catch (error) {
		throw new KubernetesProtocolError(what, `not an event: ${shorten(line)}`, {cause: error});
	}

	if (typeof event !== 'object' || event === null || typeof (event as WatchEvent).type !== 'string') {
		throw new KubernetesProtocolError(what, `not an event: ${shorten(line)}`);
	}

	return event as WatchEvent;
}

function shorten(text: string): string {
	const line = text.replace(/\s+/g, ' ').trim();
	return line.length > MAX_DETAIL ? `${line.slice(0, MAX_DETAIL)}…` : line;
}
