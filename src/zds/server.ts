/**
Tells ztunnel which pods there are, and hands it their network namespaces.

Level-triggered: what is wanted stands in one place, each connection knows what its ztunnel was told, and whoever has nothing outstanding is sent the next difference.
*/
import {mkdirSync} from 'node:fs';
import path from 'node:path';
import {HostError, hasErrno, reasonOf} from '../errors.js';
import {native, type NetNs, type SeqpacketConnection, type SeqpacketListener} from '../native.js';
import {SocketFile} from '../socket-file.js';
import {Connection, DROP_REASONS, KINDS, type DropReason, type Kind, type Request, type Told, type Verdict} from './connection.js';
import {SNAPSHOT_SENT, encodeAdd, encodeDelete, encodeKeep, type WorkloadName} from './messages.js';

export interface Workload extends WorkloadName {
	/** Of the pod's namespace; undefined when that is not known. Inodes will not do: the kernel gives them out again at once. */
	readonly cookie: bigint | undefined;
	/** Opens that namespace, and no other, to be closed by the caller; undefined when it cannot be. Must not throw. */
	openNetns(): NetNs | undefined;
}

/**
A verdict stays when its ztunnel is gone, until one that connects says otherwise. A workload that was `refused` is tried again by ztunnel itself every 5 s, which does
not tell; {@link ZdsServer.put} asks it. `waiting`: nobody has said anything about this workload and this namespace yet.
*/
export type WorkloadState = Verdict | {readonly kind: 'waiting'; readonly why: string};

export interface ConnectionInfo {
	/** Of the process that connected; 0 when it is of a PID namespace that cannot be seen. */
	readonly pid: number;
	readonly since: Date;
	/** Whether its ztunnel has answered the whole snapshot. */
	readonly isSnapshotDone: boolean;
	/** Whether its ztunnel gets new workloads. */
	readonly isCurrent: boolean;
}

export interface ZdsCounters {
	readonly connections: number;
	/** Requests; `snapshot` is its end. */
	readonly sent: Readonly<Record<Kind, number>>;
	readonly acks: number;
	/** Answers with an error. */
	readonly nacks: number;
	/** Ended connections, by reason; `unanswered` are the time-outs. */
	readonly dropped: Readonly<Record<DropReason, number>>;
}

export interface ZdsServerOptions {
	/** Its directory is made when it is missing. */
	readonly socketPath: string;
	/** How long a ztunnel may take to say hello, and to answer each request; default 5000. */
	readonly ackTimeoutMs?: number;
	/** Until {@link ZdsServer.release}, no snapshot ends: ztunnel drains what is not in it. */
	readonly isHeld?: boolean;
	/** Look this often whether the socket's file is still there. */
	readonly checkMs?: number;
	readonly log: (line: string) => void;
	/** {@link ZdsServer.state} of this workload is of another kind, or has another error, than before. */
	readonly onChange?: (uid: string) => void;
}

const ACK_TIMEOUT_MS = 5000;
/** Before new connections are taken again, when there was no fd left for one. */
const ACCEPT_PAUSE_MS = 1000;

interface Wanted {
	workload: Workload;
	/** Another one is another thing to tell. */
	revision: number;
	/** Of the namespace; undefined when it is not known, or could not be opened when it was to be told of. */
	cookie: bigint | undefined;
	/** The last word, and the namespace that it was about. */
	decided: {readonly verdict: Verdict; readonly cookie: bigint | undefined} | undefined;
	/** There may be a word about this revision still. */
	isPending: boolean;
	readonly waiters: Set<() => void>;
}

export class ZdsServer {
	readonly #options: ZdsServerOptions;
	readonly #wanted = new Map<string, Wanted>();
	/** Those that have said hello are in the order in which they did. */
	readonly #connections = new Set<Connection>();
	readonly #counters = {connections: 0, sent: zeros(KINDS), acks: 0, nacks: 0, dropped: zeros(DROP_REASONS)};
	readonly #file: SocketFile;
	#listener: SeqpacketListener | undefined;
	#acceptPause: NodeJS.Timeout | undefined;
	#revisions = 0;
	#isHeld: boolean;

	constructor(options: ZdsServerOptions) {
		this.#options = options;
		this.#isHeld = options.isHeld ?? false;
		const {socketPath: path, checkMs, log} = options;
		this.#file = new SocketFile({
			title: 'ztunnel\'s socket', path, checkMs, log,
			open: () => {
				this.#open();
			},
		});
	}

	/** Why no ztunnel can connect now. */
	get problem(): string | undefined {
		return this.#file.problem;
	}

	/**
	Listens; a socket that a dead agent left is replaced. One that disappears while we run is made again.

	@throws HostError when another process listens there, or it is no place for a socket.
	*/
	listen(): void {
		this.#open();
		this.#file.lookAfter();
	}

	/**
	Adds or replaces a workload. Does nothing when its namespace is the same or not known now, unless ztunnel refused it: then it is asked again. So do not
	call it from `onChange` without a pause.

	@throws PodError when the names are too long to be told.
	*/
	put(workload: Workload): void {
		encodeAdd(workload);
		const {uid, cookie} = workload;
		let wanted = this.#wanted.get(uid);
		if (!wanted) {
			wanted = {workload, revision: 0, cookie: undefined, decided: undefined, isPending: false, waiters: new Set()};
			this.#wanted.set(uid, wanted);
		} else if (cookie === undefined || (cookie === wanted.cookie && wanted.decided?.verdict.kind !== 'refused')) {
			wanted.workload = workload;
			return;
		}

		wanted.workload = workload;
		wanted.revision = ++this.#revisions;
		wanted.isPending = true;
		this.#locate(wanted, cookie);
		this.#advance(uid);
	}

	/** All workloads that there were have been put. */
	release(): void {
		this.#isHeld = false;
		for (const connection of [...this.#connections].filter(({hasSaidHello}) => hasSaidHello)) {
			this.#send(connection);
		}
	}

	has(uid: string): boolean {
		return this.#wanted.has(uid);
	}

	/** ztunnel drains its connections, and closes its listeners. */
	remove(uid: string): void {
		const wanted = this.#wanted.get(uid);
		if (wanted) {
			this.#wanted.delete(uid);
			this.#advance(uid);
			this.#settle(wanted);
		}
	}

	state(uid: string): WorkloadState {
		const wanted = this.#wanted.get(uid);
		return wanted?.decided?.verdict ?? {kind: 'waiting', why: this.#whyWaiting(wanted)};
	}

	/** Resolves when ztunnel has answered what was last put, and after `timeoutMs` at the latest: with the state then. */
	async settled(uid: string, timeoutMs: number): Promise<WorkloadState> {
		const deadline = performance.now() + timeoutMs;
		for (let left = timeoutMs; left > 0 && this.#wanted.get(uid)?.isPending; left = deadline - performance.now()) {
			await this.#change(this.#wanted.get(uid)!, left);
		}

		return this.state(uid);
	}

	get connections(): readonly ConnectionInfo[] {
		const current = this.#current;
		return [...this.#connections].map(connection => ({pid: connection.pid, since: connection.since, isSnapshotDone: connection.isSnapshotDone, isCurrent: connection === current}));
	}

	/** A copy. */
	get counters(): ZdsCounters {
		return structuredClone(this.#counters);
	}

	/** ztunnel goes on with what it has. The socket's file stays, for the next one to replace. */
	close(): void {
		this.#file.close();
		clearTimeout(this.#acceptPause);
		this.#listener?.close();
		this.#listener = undefined;
		for (const connection of this.#connections) {
			connection.close();
		}

		this.#connections.clear();
		for (const wanted of this.#wanted.values()) {
			this.#settle(wanted);
		}
	}

	#open(): void {
		const {socketPath, log} = this.#options;
		const former = this.#listener;
		try {
			mkdirSync(path.dirname(socketPath), {recursive: true});
			this.#listener = native.listenSeqpacket(socketPath, 0o600, {
				onConnection: socket => {
					this.#onConnection(socket);
				},
				onError: error => {
					log(`a connection to ${socketPath} cannot be taken (${reasonOf(error)}): trying again in ${ACCEPT_PAUSE_MS} ms`);
					this.#acceptPause = setTimeout(() => this.#listener?.resume(), ACCEPT_PAUSE_MS);
				},
			});
		} catch (error) {
			const remedy = hasErrno(error, 'EADDRINUSE') ? 'stop the other agent that listens there, or remove what is there if it is no socket' : 'choose another path for it, or mount its directory again if that was made anew on the host';
			throw new HostError(`ztunnel's socket cannot be served at ${socketPath} (${reasonOf(error)})`, remedy, {cause: error});
		}

		former?.close();
	}

	#onConnection(socket: SeqpacketConnection): void {
		this.#counters.connections++;
		try {
			const connection: Connection = new Connection(socket, this.#options.ackTimeoutMs ?? ACK_TIMEOUT_MS, {
				onHello: () => {
					this.#onHello(connection);
				},
				onAck: (request, error) => {
					this.#onAck(connection, request, error);
				},
				onDrop: (reason, detail) => {
					this.#onDrop(connection, reason, detail);
				},
			});
			this.#connections.add(connection);
		} catch (error) {
			socket.close();
			this.#counters.dropped.broken++;
			this.#options.log(`a connection to ${this.#options.socketPath} was dropped (${reasonOf(error)}): ztunnel connects again by itself`);
		}
	}

	/** The newest ztunnel: the one that gets new workloads, and whose word counts. */
	get #current(): Connection | undefined {
		return [...this.#connections].findLast(connection => connection.hasSaidHello);
	}

	#onHello(connection: Connection): void {
		this.#connections.delete(connection);
		this.#connections.add(connection);
		this.#options.log(`${connection.title} connected: ${this.#wanted.size} workloads`);
		connection.look(this.#wanted.keys());
		this.#send(connection);
	}

	#onAck(connection: Connection, {kind, uid}: Request, error: string): void {
		this.#counters[error === '' ? 'acks' : 'nacks']++;
		const wanted = uid === undefined ? undefined : this.#wanted.get(uid);
		if (error !== '') {
			const {namespace, name} = wanted?.workload ?? {};
			this.#options.log(`${connection.title} refused ${kind === 'add' && wanted ? `pod ${namespace}/${name}` : `"${kind}"`} (${error}): it tries again by itself`);
		}

		if (kind === 'add') {
			connection.told.get(uid!)!.verdict = error === '' ? {kind: 'acknowledged'} : {kind: 'refused', error};
			if (connection === this.#current) {
				this.#judge(uid!, connection);
			}
		}

		this.#send(connection);
	}

	#onDrop(connection: Connection, reason: DropReason, detail: string): void {
		const wasCurrent = connection === this.#current;
		this.#connections.delete(connection);
		this.#counters.dropped[reason]++;
		this.#options.log(`${connection.title} ${detail}`);
		const next = this.#current;
		if (wasCurrent && next) {
			// An older ztunnel is the newest again: it may lack what only the other one was told.
			next.look(this.#wanted.keys());
			for (const uid of this.#wanted.keys()) {
				this.#judge(uid, next);
			}

			this.#send(next);
		}
	}

	/** Takes over what `connection` has said of a workload as it is wanted now. */
	#judge(uid: string, connection: Connection): void {
		const wanted = this.#wanted.get(uid);
		const told = connection.told.get(uid);
		if (!wanted || !told?.verdict || told.revision !== wanted.revision) {
			return;
		}

		const before = this.state(uid);
		wanted.decided = {verdict: told.verdict, cookie: told.cookie};
		this.#settle(wanted);
		this.#report(uid, before);
	}

	/** What was said about another namespace does not hold for this one. */
	#locate(wanted: Wanted, cookie: bigint | undefined): void {
		const {uid} = wanted.workload;
		const before = this.state(uid);
		wanted.cookie = cookie;
		if (cookie !== undefined && wanted.decided?.cookie !== cookie) {
			wanted.decided = undefined;
			wanted.isPending = true;
		}

		this.#report(uid, before);
	}

	#report(uid: string, before: WorkloadState): void {
		const now = this.state(uid);
		if (now.kind !== before.kind || (now.kind === 'refused' && before.kind === 'refused' && now.error !== before.error)) {
			this.#options.onChange?.(uid);
		}
	}

	#settle(wanted: Wanted): void {
		wanted.isPending = false;
		for (const done of wanted.waiters) {
			done();
		}
	}

	/** A workload has changed: whoever has nothing outstanding is told. */
	#advance(uid: string): void {
		for (const connection of this.#connections) {
			if (connection.hasSaidHello) {
				connection.look([uid]);
				this.#send(connection);
			}
		}
	}

	#send(connection: Connection): void {
		while (connection.isIdle) {
			const uid = connection.next();
			if (uid !== undefined) {
				this.#tell(connection, uid);
			} else if (connection.isSnapshotSent || this.#isHeld) {
				return;
			} else {
				connection.isSnapshotSent = true;
				// ztunnel takes a Del for an error before: so they come now.
				connection.look(connection.told.keys());
				this.#request(connection, {kind: 'snapshot'}, SNAPSHOT_SENT);
			}
		}
	}

	/** Sends what makes the difference between what is wanted and what its ztunnel was told, if there is one that it may be sent. */
	#tell(connection: Connection, uid: string): void {
		const wanted = this.#wanted.get(uid);
		const told = connection.told.get(uid);
		const isNewer = connection === this.#current || !connection.isSnapshotSent;
		if (wanted && isNewer && told?.revision !== wanted.revision) {
			this.#tellOf(connection, wanted);
		} else if (told && connection.isSnapshotSent && (!wanted || (!isNewer && hasOtherNamespace(told, wanted)))) {
			connection.told.delete(uid);
			this.#request(connection, {kind: 'delete', uid}, encodeDelete(uid));
		}
	}

	#tellOf(connection: Connection, wanted: Wanted): void {
		const {workload, revision} = wanted;
		const {uid} = workload;
		const netns = workload.openNetns();
		try {
			this.#locate(wanted, netns && workload.cookie);
			if (netns) {
				connection.told.set(uid, {revision, cookie: wanted.cookie});
				this.#request(connection, {kind: 'add', uid}, encodeAdd(workload), netns.fd);
				return;
			}
		} finally {
			netns?.close();
		}

		// Until it is put with a namespace.
		this.#settle(wanted);
		connection.told.set(uid, {revision, cookie: connection.told.get(uid)?.cookie});
		if (!connection.isSnapshotSent) {
			this.#request(connection, {kind: 'keep', uid}, encodeKeep(uid));
		}
	}

	#request(connection: Connection, request: Request, bytes: Uint8Array, fd?: number): void {
		if (connection.send(request, bytes, fd)) {
			this.#counters.sent[request.kind]++;
		}
	}

	#whyWaiting(wanted: Wanted | undefined): string {
		if (!wanted) {
			return 'the workload is not there';
		}

		if (wanted.cookie === undefined) {
			return 'its network namespace is not known';
		}

		return this.#current ? 'ztunnel has not answered yet' : 'no ztunnel is connected';
	}

	async #change(wanted: Wanted, timeoutMs: number): Promise<void> {
		return new Promise(resolve => {
			const done = () => {
				clearTimeout(timer);
				wanted.waiters.delete(done);
				resolve();
			};

			const timer = setTimeout(done, timeoutMs);
			wanted.waiters.add(done);
		});
	}
}

const zeros = <Name extends string>(names: readonly Name[]) => Object.fromEntries(names.map(name => [name, 0])) as Record<Name, number>;

function hasOtherNamespace(told: Told, wanted: Wanted): boolean {
	return told.cookie !== undefined && wanted.cookie !== undefined && told.cookie !== wanted.cookie;
}
