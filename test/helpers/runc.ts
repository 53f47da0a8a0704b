/**
Containers of a world's pods, by runc alone: OCI bundles and cgroups as a kubelet and its runtime name them. They have the world's busybox, run in the world's namespaces, and end with
the world.
*/
import {copyFileSync, existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {removeContainerCgroups} from '../cni/container-host.js';
import {Running, run} from './process.js';
import type {World} from './world.js';

const BUSYBOX = '/bin/busybox';
const CAPABILITIES = ['CAP_NET_ADMIN', 'CAP_NET_RAW', 'CAP_SYS_ADMIN', 'CAP_SYS_CHROOT', 'CAP_KILL'];

export class Runc {
	readonly #world: World;
	#containers = 0;

	constructor(world: World) {
		this.#world = world;
		mkdirSync(this.#path('rootfs/bin'), {recursive: true});
		mkdirSync(this.#path('rootfs/proc'));
		copyFileSync(BUSYBOX, this.#path('rootfs/bin/busybox'));
		for (const name of ['sh', 'nc', 'ip', 'sleep', 'unshare']) {
			symlinkSync('busybox', this.#path('rootfs/bin', name));
		}

		world.onEnd(async () => removeContainerCgroups(world));
	}

	/**
	A container that runs `script` in busybox' shell; the script has begun.

	@param netns - the file of the network namespace that it joins.
	@param cgroup - below the world's; ends with the container's own name.
	*/
	async container({netns, cgroup, script = 'sleep 1000'}: {readonly netns: string; readonly cgroup: (id: string) => string; readonly script?: string}): Promise<Container> {
		const id = `${this.#world.id}-c${++this.#containers}`;
		const bundle = this.#path(id);
		mkdirSync(bundle);
		writeFileSync(path.join(bundle, 'config.json'), JSON.stringify({
			ociVersion: '1.0.2',
			process: {
				cwd: '/', user: {uid: 0, gid: 0}, env: ['PATH=/bin'], args: ['/bin/sh', '-c', `echo started; ${script}`],
				capabilities: {bounding: CAPABILITIES, effective: CAPABILITIES, permitted: CAPABILITIES},
			},
			root: {path: this.#path('rootfs'), readonly: true},
			mounts: [{destination: '/proc', type: 'proc', source: 'proc'}],
			linux: {
				namespaces: [{type: 'mount'}, {type: 'pid'}, {type: 'ipc'}, {type: 'uts'}, {type: 'network', path: netns}],
				cgroupsPath: path.join('/', this.#world.id, cgroup(id)),
			},
		}));
		const running = this.#world.node.start(['runc', '--root', this.#path('state'), 'run', '--bundle', bundle, '--pid-file', path.join(bundle, 'pid'), id]);
		const container = new Container(running, id, this.#path('state'), path.join(bundle, 'pid'));
		this.#world.onEnd(() => {
			container.delete();
		});
		await running.until('its script has begun', () => running.stdout.includes('started\n') && existsSync(container.pidFile));
		return container;
	}

	#path(...names: readonly string[]): string {
		return path.join(this.#world.directory, 'runc', ...names);
	}
}

export class Container {
	constructor(readonly running: Running, readonly id: string, readonly root: string, readonly pidFile: string) {}

	/** Of its first process, as the machine counts. */
	get pid(): number {
		return Number(readFileSync(this.pidFile, 'utf8'));
	}

	get netns(): string {
		return `/proc/${this.pid}/ns/net`;
	}

	/** A command in busybox' shell inside of it, to its end. */
	exec(script: string): {readonly code: number | null; readonly stdout: string; readonly stderr: string} {
		return run('runc', ['--root', this.root, 'exec', this.id, '/bin/sh', '-c', script]);
	}

	/** As a kubelet that has lost patience. */
	kill(): number | null {
		return run('runc', ['--root', this.root, 'kill', this.id, 'KILL']).code;
	}

	/** Kills and deletes it; nothing if that was done. */
	delete(): void {
		run('runc', ['--root', this.root, 'delete', '--force', this.id]);
	}
}
