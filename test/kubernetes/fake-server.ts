/**
A Kubernetes API server as far as the agent uses one: pods, namespaces, events; lists in pages, watches with bookmarks and compaction, merge patches of a pod's status. It
speaks HTTP over real sockets, and misbehaves on request.
*/
import {Buffer} from 'node:buffer';
import {randomUUID} from 'node:crypto';
import {once} from 'node:events';
import {writeFileSync} from 'node:fs';
import http, {type IncomingMessage, type ServerResponse} from 'node:http';
import https from 'node:https';
import type {AddressInfo, Socket} from 'node:net';
import path from 'node:path';
import {performance} from 'node:perf_hooks';
import {native} from '../../src/native.js';
import {makeCertificate, type Certificate} from './certificate.js';

export type Kind = 'pods' | 'namespaces';

/** An object of the API, in its JSON shape. */
export interface ApiObject {
	metadata: {name: string; namespace?: string; uid?: string; resourceVersion?: string; labels?: Record<string, string>; annotations?: Record<string, string>; [more: string]: unknown};
	[more: string]: unknown;
}

export interface FakeApiServerOptions {
	/** @default true */
	readonly tls?: boolean;
	/** What a client has to show. Nothing is asked for without one. */
	readonly token?: string;
	/** How often watches get a bookmark. @default 60,000 ms */
	readonly bookmarkMs?: number;
	/** How long a second of `timeoutSeconds` is. @default 1,000 ms */
	readonly secondMs?: number;
	/** @default 127.0.0.1 */
	readonly host?: string;
	/** The file of the network namespace to listen in, at 127.0.0.1; this process's own by default. */
	readonly netns?: string;
}

/** What goes wrong. All off at first; each holds for as long as it is set. */
export interface Hostility {
	/** How likely what is set is done to a request or event it could be done to. @default 1 */
	chance: number;
	/** To which requests; all by default. */
	applies: (request: RequestRecord) => boolean;
	/** Answers every request with this status. */
	status: number;
	/** The value of Retry-After that goes with `status`. */
	retryAfter: string;
	/** Takes requests and never answers. */
	silent: boolean;
	/** Resets the connection of every request before an answer. */
	reset: boolean;
	/** Ends every watch as soon as it has begun. */
	closeWatches: boolean;
	/** Says 410 to every watch: as its status, or in an event. */
	gone: 'http' | 'in band';
	/** Says 410 to every page but the first. */
	gonePages: boolean;
	/** An ERROR event with this status begins every watch. */
	inBandStatus: number;
	/** In the place of an event: half of it and a reset, half of it and silence, text that is no event, a line without end. */
	event: 'reset' | 'half' | 'garbage' | 'endless' | 'closed';
	/** Each event comes twice, and old ones come again, backwards. */
	repeats: boolean;
	/** Events that are sent together come in the wrong order. */
	shuffled: boolean;
	/** Events come in pieces of so many bytes, one a millisecond. */
	trickleBytes: number;
	/** Between two pages of a list something changes: called before every page but the first. */
	onPage: () => void;
	/** Each page shows the time it is asked for, not that of the first. */
	movingPages: boolean;
	/** A list is answered with something that is none. */
	list: 'garbage' | 'no version' | 'pages without end';
}

export interface RequestRecord {
	/** On the clock of performance.now(). */
	readonly atMs: number;
	readonly method: string;
	readonly path: string;
	readonly query: URLSearchParams;
	readonly isWatch: boolean;
	/** What was answered; undefined while, or if, nothing was. */
	status: number | undefined;
	body: unknown;
}

interface Change {
	readonly version: number;
	readonly type: 'ADDED' | 'MODIFIED' | 'DELETED';
	readonly object: ApiObject;
	/** What it was before. */
	readonly earlier: ApiObject | undefined;
}

interface Watcher {
	readonly kind: Kind;
	readonly isSelected: (object: ApiObject) => boolean;
	readonly wantsBookmarks: boolean;
	readonly record: RequestRecord;
	readonly response: ServerResponse;
	/** Has all changes up to this version. */
	version: number;
	/** An event is being trickled, or nothing will ever come again. */
	isStuck: boolean;
}

const PLURAL: Record<Kind, {readonly kind: string; readonly list: string}> = {pods: {kind: 'Pod', list: 'PodList'}, namespaces: {kind: 'Namespace', list: 'NamespaceList'}};
const ENDLESS_BYTES = 9 << 20;

export class FakeApiServer {
	/** What went over the wire, oldest first. */
	readonly history: RequestRecord[] = [];
	/** Events (events.k8s.io/v1 or v1) that clients created. */
	readonly events: ApiObject[] = [];
	readonly hostility: Partial<Hostility> = {};
	/** Tokens that are accepted; empty: all. */
	readonly tokens = new Set<string>();
	/** Draws for {@link Hostility.chance}; seed it to repeat a run. */
	random: () => number = Math.random;
	readonly #objects: Record<Kind, Map<string, ApiObject>> = {pods: new Map(), namespaces: new Map()};
	readonly #changes: Record<Kind, Change[]> = {pods: [], namespaces: []};
	readonly #watchers = new Set<Watcher>();
	readonly #sockets = new Map<number, Socket>();
	readonly #pages = new Map<string, {readonly rest: readonly ApiObject[]; readonly version: number; readonly last: string}>();
	readonly #timers = new Set<NodeJS.Timeout>();
	readonly #options: FakeApiServerOptions;
	#server: http.Server | https.Server | undefined;
	#certificate: Certificate | undefined;
	#port = 0;
	#version = 1000;
	#compacted = 0;
	#connections = 0;

	private constructor(options: FakeApiServerOptions) {
		this.#options = options;
		this.#certificate = options.tls === false ? undefined : makeCertificate();
		if (options.token !== undefined) {
			this.tokens.add(options.token);
		}
	}

	static async start(options: FakeApiServerOptions = {}): Promise<FakeApiServer> {
		const server = new FakeApiServer(options);
		await server.listen();
		return server;
	}

	get url(): string {
		const {host = '127.0.0.1', tls = true} = this.#options;
		return `http${tls ? 's' : ''}://${host.includes(':') ? `[${host}]` : host}:${this.#port}`;
	}

	/** The certificate's authority, PEM. */
	get ca(): string | undefined {
		return this.#certificate?.cert;
	}

	/** The version of the last change. */
	get version(): number {
		return this.#version;
	}

	get openConnections(): number {
		return this.#sockets.size;
	}

	/** Connections that were ever made. */
	get connections(): number {
		return this.#connections;
	}

	get openWatches(): number {
		return this.#watchers.size;
	}

	/** Writes token and authority to files in `directory`: what a client's options take. */
	writeCredentials(directory: string): {readonly server: string; readonly tokenFile: string; readonly caFile?: string} {
		const tokenFile = path.join(directory, 'token');
		const caFile = path.join(directory, 'ca.crt');
		writeFileSync(tokenFile, [...this.tokens].at(-1) ?? 'any');
		if (this.ca === undefined) {
			return {server: this.url, tokenFile};
		}

		writeFileSync(caFile, this.ca);
		return {server: this.url, tokenFile, caFile};
	}

	/** Listens, again on the same port after {@link stop}. */
	async listen(): Promise<void> {
		const onRequest = (request: IncomingMessage, response: ServerResponse) => {
			void this.#answer(request, response);
		};

		const server = this.#certificate ? https.createServer({...this.#certificate}, onRequest) : http.createServer(onRequest);
		this.#server = server;
		server.keepAliveTimeout = 120_000;
		server.on('connection', (socket: Socket) => {
			const {remotePort = 0} = socket;
			this.#connections++;
			this.#sockets.set(remotePort, socket);
			socket.on('error', () => {});
			socket.once('close', () => {
				this.#sockets.delete(remotePort);
			});
		});
		server.on('tlsClientError', () => {});
		server.on('clientError', (_error, socket) => {
			socket.destroy();
		});
		const {netns, host = '127.0.0.1'} = this.#options;
		server.listen(netns === undefined ? {port: this.#port, host} : {fd: listenIn(netns, this.#port)});
		await once(server, 'listening');
		this.#port = (server.address() as AddressInfo).port;
		const bookmarks = setInterval(() => {
			for (const watcher of this.#watchers) {
				if (watcher.wantsBookmarks && !watcher.isStuck) {
					this.#send(watcher, `${JSON.stringify({type: 'BOOKMARK', object: {kind: PLURAL[watcher.kind].kind, apiVersion: 'v1', metadata: {resourceVersion: String(watcher.version), creationTimestamp: null}}})}\n`);
				}
			}
		}, this.#options.bookmarkMs ?? 60_000);
		this.#timers.add(bookmarks);
	}

	/** Ends every connection and refuses new ones, until {@link listen}. */
	async stop(): Promise<void> {
		for (const timer of this.#timers) {
			clearTimeout(timer);
		}

		this.#timers.clear();
		const closed = once(this.#server!, 'close');
		this.#server!.close();
		for (const socket of this.#sockets.values()) {
			socket.destroy();
		}

		await closed;
	}

	resetConnections(): void {
		for (const socket of this.#sockets.values()) {
			socket.resetAndDestroy();
		}
	}

	/** Ends all watches in the regular way. */
	endWatches(): void {
		for (const {response} of this.#watchers) {
			response.end();
		}
	}

	/** From the next connection on; the others are reset. */
	rotateCertificate(): void {
		this.#certificate = makeCertificate();
		(this.#server as https.Server).setSecureContext({...this.#certificate});
		this.resetConnections();
	}

	/** Forgets all changes so far: whoever did not see them gets 410. */
	compact(): void {
		this.#compacted = this.#version;
		for (const kind of ['pods', 'namespaces'] as const) {
			this.#changes[kind].length = 0;
		}

		this.#pages.clear();
	}

	/** As after a backup was put back: the same objects, and versions go on from `version`. Watches end. */
	restore(version: number): void {
		this.#version = version;
		this.compact();
		for (const kind of ['pods', 'namespaces'] as const) {
			for (const [key, object] of this.#objects[kind]) {
				this.#objects[kind].set(key, {...object, metadata: {...object.metadata, resourceVersion: String(++this.#version)}});
			}
		}

		this.endWatches();
	}

	/** Sets what goes wrong from now on; nothing by default. */
	behave(hostility: Partial<Hostility> = {}): void {
		for (const key of Object.keys(this.hostility)) {
			delete this.hostility[key as keyof Hostility];
		}

		Object.assign(this.hostility, hostility);
	}

	/** Creates the object, or replaces the one of its name. What is left out of its metadata is filled in. @returns it as stored. */
	put(kind: Kind, object: ApiObject): ApiObject {
		const key = keyOf(object);
		const earlier = this.#objects[kind].get(key);
		const isOther = earlier !== undefined && object.metadata.uid !== undefined && object.metadata.uid !== earlier.metadata.uid;
		if (isOther) {
			this.delete(kind, key);
		}

		const before = isOther ? undefined : earlier;
		const stored: ApiObject = {
			...object,
			metadata: {
				creationTimestamp: new Date().toISOString(), managedFields: [{manager: 'kubelet', operation: 'Update', fieldsV1: {'f:status': {}}}], ...object.metadata,
				uid: object.metadata.uid ?? before?.metadata.uid ?? randomUUID(),
				resourceVersion: String(++this.#version),
			},
		};
		this.#objects[kind].set(key, stored);
		this.#publish(kind, {version: this.#version, type: before ? 'MODIFIED' : 'ADDED', object: stored, earlier: before});
		return stored;
	}

	/** @param key - `namespace/name`, or a namespace's name. */
	delete(kind: Kind, key: string): void {
		const earlier = this.#objects[kind].get(key);
		if (!earlier) {
			return;
		}

		this.#objects[kind].delete(key);
		const object = {...earlier, metadata: {...earlier.metadata, resourceVersion: String(++this.#version)}};
		this.#publish(kind, {version: this.#version, type: 'DELETED', object, earlier});
	}

	get(kind: Kind, key: string): ApiObject | undefined {
		return this.#objects[kind].get(key);
	}

	list(kind: Kind): readonly ApiObject[] {
		return [...this.#objects[kind].values()];
	}

	/** Requests from `fromMs` on, that were for a path that starts with `prefix`. */
	requests(prefix = '', fromMs = 0): readonly RequestRecord[] {
		return this.history.filter(({path: target, atMs}) => target.startsWith(prefix) && atMs >= fromMs);
	}

	async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
		const {pathname, searchParams} = new URL(request.url ?? '/', 'http://server');
		const record: RequestRecord = {
			atMs: performance.now(), method: request.method ?? '', path: pathname, query: searchParams, isWatch: /^(?:1|true)$/.test(searchParams.get('watch') ?? ''), status: undefined, body: undefined,
		};
		this.history.push(record);
		response.on('error', () => {});
		const text = await readText(request);
		if (text === undefined) {
			return;
		}

		record.body = text && JSON.parse(text) as unknown;
		const {hostility} = this;
		if (this.#strikes(record)) {
			if (hostility.silent) {
				return;
			}

			if (hostility.reset) {
				this.#sockets.get(request.socket.remotePort ?? 0)?.resetAndDestroy();
				return;
			}

			if (hostility.status !== undefined) {
				this.#refuse(response, record, hostility.status, 'InternalError', 'the server is hostile', hostility.retryAfter === undefined ? {} : {'retry-after': hostility.retryAfter});
				return;
			}
		}

		const [, token] = /^Bearer (.*)$/.exec(request.headers.authorization ?? '') ?? [];
		if (this.tokens.size > 0 && !this.tokens.has(token ?? '')) {
			this.#refuse(response, record, 401, 'Unauthorized', 'Unauthorized');
			return;
		}

		this.#route(record, response);
	}

	#route(record: RequestRecord, response: ServerResponse): void {
		const parts = record.path.split('/').filter(Boolean);
		const {method} = record;
		const collection = /^\/api\/v1\/(pods|namespaces)$/.exec(record.path)?.[1] as Kind | undefined;
		if (collection && method === 'GET') {
			if (record.isWatch) {
				this.#watch(collection, record, response);
			} else {
				this.#list(collection, record, response);
			}

			return;
		}

		const [, namespace, name, subresource] = /^\/api\/v1\/namespaces\/([^/]+)(?:\/pods\/([^/]+)(\/status)?)?$/.exec(record.path) ?? [];
		if (namespace !== undefined && method === 'GET' && subresource === undefined) {
			const [kind, key] = name === undefined ? ['namespaces', namespace] as const : ['pods', `${namespace}/${name}`] as const;
			const object = this.#objects[kind].get(key);
			if (object) {
				this.#respond(response, record, 200, {kind: PLURAL[kind].kind, apiVersion: 'v1', ...object});
			} else {
				this.#refuse(response, record, 404, 'NotFound', `${kind} "${name ?? namespace}" not found`);
			}

			return;
		}

		if (name !== undefined && method === 'PATCH') {
			this.#patch(`${namespace}/${name}`, record, response);
			return;
		}

		if (method === 'POST' && parts.at(-1) === 'events') {
			const event = record.body as ApiObject;
			if (this.events.some(({metadata}) => metadata.name === event.metadata.name && metadata.namespace === event.metadata.namespace)) {
				this.#refuse(response, record, 409, 'AlreadyExists', `events "${event.metadata.name}" already exists`);
			} else {
				this.events.push(event);
				this.#respond(response, record, 201, event);
			}

			return;
		}

		this.#refuse(response, record, 404, 'NotFound', `the server could not find ${method} ${record.path}`);
	}

	#list(kind: Kind, record: RequestRecord, response: ServerResponse): void {
		const {hostility} = this;
		const token = record.query.get('continue');
		const strikes = this.#strikes(record);
		if (strikes && hostility.list !== undefined) {
			const items = [...this.#objects[kind].values()];
			const answers = {
				'garbage': {hello: 'world'}, 'no version': {items, metadata: {}}, 'pages without end': {items, metadata: {resourceVersion: String(this.#version), continue: 'again'}},
			};
			this.#respond(response, record, 200, answers[hostility.list]);
			return;
		}

		const now = () => [...this.#objects[kind].values()].filter(selector(record.query)).sort((a, b) => keyOf(a) < keyOf(b) ? -1 : 1);
		let page = token === null ? {rest: now(), version: this.#version, last: ''} : this.#pages.get(token);
		if (token !== null && strikes) {
			hostility.onPage?.();
			page = hostility.gonePages ? undefined : page && hostility.movingPages ? {...page, rest: now().filter(object => keyOf(object) > page!.last), version: this.#version} : page;
		}

		if (!page) {
			this.#refuse(response, record, 410, 'Expired', 'The provided continue parameter is too old to display a consistent list result.');
			return;
		}

		const limit = Number(record.query.get('limit') ?? 0) || page.rest.length;
		const rest = page.rest.slice(limit);
		let next = '';
		if (rest.length > 0) {
			next = Buffer.from(JSON.stringify({rv: page.version, id: randomUUID()})).toString('base64url');
			this.#pages.set(next, {rest, version: page.version, last: keyOf(page.rest[limit - 1]!)});
		}

		this.#respond(response, record, 200, {
			kind: PLURAL[kind].list, apiVersion: 'v1', metadata: {resourceVersion: String(page.version), ...(next ? {continue: next, remainingItemCount: rest.length} : {})}, items: page.rest.slice(0, limit),
		});
	}

	#watch(kind: Kind, record: RequestRecord, response: ServerResponse): void {
		const {hostility} = this;
		const {query} = record;
		const from = query.get('resourceVersion') ?? '';
		const strikes = this.#strikes(record);
		if (strikes && hostility.gone === 'http') {
			this.#refuse(response, record, 410, 'Expired', `too old resource version: ${from} (${this.#compacted})`);
			return;
		}

		record.status = 200;
		response.writeHead(200, {'content-type': 'application/json'}).flushHeaders();
		response.socket?.setNoDelay(true);
		const error = (code: number, reason: string, message: string) => {
			response.end(`${JSON.stringify({type: 'ERROR', object: {kind: 'Status', apiVersion: 'v1', metadata: {}, status: 'Failure', message, reason, code}})}\n`);
		};

		if ((strikes && hostility.gone === 'in band') || (from && from !== '0' && Number(from) < this.#compacted)) {
			error(410, 'Expired', `too old resource version: ${from} (${this.#compacted})`);
			return;
		}

		if (strikes && hostility.inBandStatus !== undefined) {
			error(hostility.inBandStatus, 'InternalError', 'etcdserver: mvcc: something');
			return;
		}

		if (strikes && hostility.closeWatches) {
			response.end();
			return;
		}

		const watcher: Watcher = {
			kind, isSelected: selector(query), wantsBookmarks: query.get('allowWatchBookmarks') === 'true', record, response, version: Math.min(Number(from) || this.#compacted, this.#version), isStuck: false,
		};
		this.#watchers.add(watcher);
		const timeout = setTimeout(() => {
			response.end();
		}, Number(query.get('timeoutSeconds') ?? 1800) * (this.#options.secondMs ?? 1000));
		this.#timers.add(timeout);
		response.once('close', () => {
			clearTimeout(timeout);
			this.#timers.delete(timeout);
			this.#watchers.delete(watcher);
		});
		this.#catchUp(watcher);
	}

	#publish(kind: Kind, change: Change): void {
		this.#changes[kind].push(change);
		for (const watcher of this.#watchers) {
			if (watcher.kind === kind) {
				this.#catchUp(watcher);
			}
		}
	}

	/** Sends what the watcher has not seen, in one write. */
	#catchUp(watcher: Watcher): void {
		const changes = this.#changes[watcher.kind];
		let fresh = changes.filter(({version}) => version > watcher.version);
		if (fresh.length === 0 || watcher.isStuck) {
			return;
		}

		watcher.version = fresh.at(-1)!.version;
		const {hostility} = this;
		const strikes = this.#strikes(watcher.record);
		if (strikes && hostility.shuffled) {
			fresh = [...fresh].sort(() => this.random() - 0.5);
		}

		if (strikes && hostility.repeats) {
			fresh = [...fresh, ...fresh, ...changes.slice(-20).reverse()];
		}

		const lines = fresh.map(change => eventFor(watcher, change)).filter(event => event !== undefined).map(event => `${JSON.stringify(event)}\n`).join('');
		if (!lines) {
			return;
		}

		const half = lines.slice(0, lines.lastIndexOf('\n', lines.length - 2) + 1 + Math.ceil((lines.length - lines.lastIndexOf('\n', lines.length - 2)) / 2));
		switch (strikes ? hostility.event : undefined) {
			case 'reset': {
				watcher.isStuck = true;
				watcher.response.write(half, () => {
					this.#sockets.get(watcher.response.socket?.remotePort ?? 0)?.resetAndDestroy();
				});
				return;
			}

			case 'half': {
				watcher.isStuck = true;
				this.#send(watcher, half);
				return;
			}

			case 'closed': {
				watcher.isStuck = true;
				watcher.response.end(half);
				return;
			}

			case 'garbage': {
				this.#send(watcher, `{"type":"ADDED","object":{"kind":\n${lines}`);
				return;
			}

			case 'endless': {
				watcher.isStuck = true;
				this.#send(watcher, `{"type":"ADDED","object":"${'x'.repeat(ENDLESS_BYTES)}`);
				return;
			}

			case undefined:
		}

		if (strikes && hostility.trickleBytes !== undefined) {
			void this.#trickle(watcher, Buffer.from(lines), hostility.trickleBytes);
			return;
		}

		this.#send(watcher, lines);
	}

	async #trickle(watcher: Watcher, bytes: Buffer, size: number): Promise<void> {
		watcher.isStuck = true;
		for (let start = 0; start < bytes.length && !watcher.response.destroyed; start += size) {
			this.#send(watcher, bytes.subarray(start, start + size));
			await new Promise(resolve => {
				setTimeout(resolve, 1);
			});
		}

		watcher.isStuck = false;
		this.#catchUp(watcher);
	}

	#send({response}: Watcher, data: string | Buffer): void {
		if (!response.writableEnded && !response.destroyed) {
			response.write(data);
		}
	}

	#patch(key: string, record: RequestRecord, response: ServerResponse): void {
		const pod = this.#objects.pods.get(key);
		const patch = record.body as Partial<ApiObject>;
		if (!pod) {
			this.#refuse(response, record, 404, 'NotFound', `pods "${key}" not found`);
			return;
		}

		const uid = patch.metadata?.uid;
		if (uid !== undefined && uid !== pod.metadata.uid) {
			this.#refuse(response, record, 409, 'Conflict', `Operation cannot be fulfilled on pods "${key}": Precondition failed: UID in precondition: ${uid}, UID in object meta: ${pod.metadata.uid}`);
			return;
		}

		const patched = mergePatch(pod, patch) as ApiObject;
		// As the real one: a patch that changes nothing makes no new version.
		const isSame = JSON.stringify(patched) === JSON.stringify(pod);
		this.#respond(response, record, 200, isSame ? pod : this.put('pods', patched));
	}

	#strikes(record: RequestRecord): boolean {
		const {chance = 1, applies} = this.hostility;
		return (applies?.(record) ?? true) && (chance === 1 || this.random() < chance);
	}

	#respond(response: ServerResponse, record: RequestRecord, status: number, body: unknown, headers: http.OutgoingHttpHeaders = {}): void {
		record.status = status;
		response.writeHead(status, {'content-type': 'application/json', ...headers}).end(JSON.stringify(body));
	}

	#refuse(response: ServerResponse, record: RequestRecord, code: number, reason: string, message: string, headers: http.OutgoingHttpHeaders = {}): void {
		this.#respond(response, record, code, {kind: 'Status', apiVersion: 'v1', metadata: {}, status: 'Failure', message, reason, code}, headers);
	}
}

/** A listening socket at 127.0.0.1. */
function listenIn(file: string, port: number): number {
	const netns = native.openNetns(file);
	try {
		const [family, stream] = [2, 1];
		const fd = netns.socket(family, stream, 0);
		native.bind(fd, new Uint8Array([family, 0, port >> 8, port & 0xff, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]));
		native.listen(fd, 64);
		return fd;
	} finally {
		netns.close();
	}
}

/** A pod as a kubelet has reported it. */
export function makePod(key: string, {uid, ips = [], labels, annotations, nodeName = 'node-1', phase = 'Running', hostNetwork, serviceAccount = 'default', deletionTimestamp}: {
	readonly uid?: string; readonly ips?: readonly string[]; readonly labels?: Record<string, string>; readonly annotations?: Record<string, string>; readonly nodeName?: string;
	readonly phase?: string; readonly hostNetwork?: boolean; readonly serviceAccount?: string; readonly deletionTimestamp?: string;
} = {}): ApiObject {
	const [namespace = '', name = ''] = key.split('/');
	return {
		metadata: {name, namespace, ...(uid === undefined ? {} : {uid}), ...(labels ? {labels} : {}), ...(annotations ? {annotations} : {}), ...(deletionTimestamp === undefined ? {} : {deletionTimestamp})},
		spec: {nodeName, serviceAccountName: serviceAccount, containers: [{name: 'main', image: 'example.org/main:1'}], ...(hostNetwork ? {hostNetwork} : {})},
		status: {phase, ...(ips.length > 0 ? {podIP: ips[0], podIPs: ips.map(ip => ({ip}))} : {})},
	};
}

export function makeNamespace(name: string, labels: Record<string, string> = {}): ApiObject {
	return {metadata: {name, labels}};
}

function keyOf({metadata: {namespace, name}}: ApiObject): string {
	return namespace === undefined ? name : `${namespace}/${name}`;
}

function selector(query: URLSearchParams): (object: ApiObject) => boolean {
	const [, node] = /^spec\.nodeName=(.*)$/.exec(query.get('fieldSelector') ?? '') ?? [];
	return object => node === undefined || (object['spec'] as {readonly nodeName?: string} | undefined)?.nodeName === node;
}

/** As a watcher with a selector sees it: what begins to match is added, what ends to match is deleted. */
function eventFor({kind, isSelected}: Watcher, {type, object, earlier}: Change): {readonly type: string; readonly object: unknown} | undefined {
	const is = type !== 'DELETED' && isSelected(object);
	const was = earlier !== undefined && isSelected(earlier);
	return is || was ? {type: is ? was ? 'MODIFIED' : 'ADDED' : 'DELETED', object: {kind: PLURAL[kind].kind, apiVersion: 'v1', ...object}} : undefined;
}

/** RFC 7386. */
function mergePatch(target: unknown, patch: unknown): unknown {
	if (typeof patch !== 'object' || patch === null || Array.isArray(patch)) {
		return patch;
	}

	const result: Record<string, unknown> = typeof target === 'object' && target !== null && !Array.isArray(target) ? {...target} : {};
	for (const [key, value] of Object.entries(patch)) {
		if (value === null) {
			delete result[key];
		} else {
			result[key] = mergePatch(result[key], value);
		}
	}

	return result;
}

/** @returns undefined when the client went away. */
async function readText(request: IncomingMessage): Promise<string | undefined> {
	try {
		const chunks: Buffer[] = [];
		for await (const chunk of request) {
			chunks.push(chunk as Buffer);
		}

		return Buffer.concat(chunks).toString();
	} catch {
		return undefined;
	}
}
