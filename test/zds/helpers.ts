import {mkdtempSync, rmSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import type {ExecutionContext} from 'ava';
import {native, type NetNs} from '../../src/native.js';
import {ZdsServer, type Workload, type ZdsServerOptions} from '../../src/zds/server.js';
import {Running} from '../helpers/process.js';

export function directoryOf(t: ExecutionContext): string {
	const directory = mkdtempSync(path.join(tmpdir(), 'sidestep-zds-'));
	t.teardown(() => {
		rmSync(directory, {recursive: true, force: true});
	});
	return directory;
}

export interface Served {
	readonly server: ZdsServer;
	readonly socketPath: string;
	readonly lines: string[];
	/** `UID KIND`, as `onChange` was told. */
	readonly changes: string[];
}

export function serve(t: ExecutionContext, options: Partial<ZdsServerOptions> = {}): Served {
	const socketPath = options.socketPath ?? path.join(directoryOf(t), 'ztunnel', 'ztunnel.sock');
	const lines: string[] = [];
	const changes: string[] = [];
	const server: ZdsServer = new ZdsServer({
		socketPath,
		ackTimeoutMs: 30_000,
		log(line) {
			lines.push(line);
		},
		onChange(uid) {
			changes.push(`${uid} ${server.state(uid).kind}`);
		},
		...options,
	});
	t.teardown(() => {
		server.close();
	});
	server.listen();
	return {server, socketPath, lines, changes};
}

/** A namespace of the test's own. */
export class TestNetns {
	readonly netns = native.createNetns();
	#isOpen = true;

	constructor(t: ExecutionContext) {
		this.netns.setUp('lo');
		t.teardown(() => {
			this.close();
		});
	}

	readonly open = (): NetNs | undefined => this.#isOpen ? native.openNetns(`/proc/self/fd/${this.netns.fd}`) : undefined;

	close(): void {
		this.#isOpen = false;
		this.netns.close();
	}
}

export function workload(uid: string, openNetns: () => NetNs | undefined): Workload {
	const netns = openNetns();
	const cookie = netns?.cookie();
	netns?.close();
	return {uid, name: `name-${uid}`, namespace: 'shop', serviceAccount: 'account', cookie, openNetns};
}

/** What the stand-in says on stdout. */
export interface ZdsLine {
	readonly zds: 'connected' | 'disconnected' | 'add' | 'keep' | 'delete' | 'snapshot' | 'retry';
	readonly uid?: string;
	readonly name?: string;
	readonly namespace?: string;
	readonly service_account?: string;
	readonly inode?: number;
	readonly workloads?: number;
}

const PROGRAM = fileURLToPath(new URL('../../../build/test/ztunnel', import.meta.url));

/** `test/programs/ztunnel.c` with --zds. */
export function startZtunnel(t: ExecutionContext, socketPath: string, ...options: readonly string[]): Running {
	const running = Running.start(PROGRAM, ['--zds', socketPath, '--brief', ...options]);
	t.teardown(async () => {
		await running.stop('SIGKILL');
	});
	return running;
}
