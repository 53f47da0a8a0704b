/**
Real containers in a world: podman with its CNI backend, runc, and Debian's bridge and host-local plugins, on the world's own bridge. podman sees the
node's network namespace, and its own /run, /var/lib, /dev/shm (its locks) and process ids, so that nothing of the machine is touched and everything ends with the test.
*/
import {copyFileSync, existsSync, mkdirSync, readFileSync, readdirSync, rmdirSync, symlinkSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {BUILT_PLUGIN} from '../../src/cni/command.js';
import {CniInstaller, PLUGIN_NAME} from '../../src/cni/install.js';
import {hasErrno} from '../../src/errors.js';
import {Running, eventually, must} from '../helpers/process.js';
import type {World} from '../helpers/world.js';

const CGROUPS = '/sys/fs/cgroup';
const BUSYBOX = '/bin/busybox';

export interface ContainerHostOptions {
	readonly cniVersion?: string;
	readonly timeoutSeconds?: number;
	/** Where the agent listens for the plugin. */
	readonly socketPath?: string;
}

/** What a kubelet would have a runtime start: its uid is in the cgroup, and its names are told to CNI plugins. */
export interface KubeletPod {
	/** namespace/name. */
	readonly key: string;
	readonly uid: string;
}

export class ContainerHost {
	readonly socketPath: string;
	readonly installer: CniInstaller;
	readonly #world: World;
	readonly #holder: Running;
	#pid = 0;

	private constructor(world: World, {cniVersion = '0.4.0', timeoutSeconds = 60, socketPath}: ContainerHostOptions) {
		this.#world = world;
		this.socketPath = socketPath ?? this.path('agent', 'cni.sock');
		this.#writeConfiguration(cniVersion);
		this.installer = new CniInstaller({binary: BUILT_PLUGIN, binDir: this.path('bin'), confDir: this.path('net.d'), socketPath: this.socketPath, timeoutSeconds, log: () => undefined});
		this.installer.install();
		world.onEnd(async () => removeContainerCgroups(world));
		this.#holder = world.node.start(['unshare', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc', 'sh', '-c', 'for directory in /run /var/lib /dev/shm; do mount -t tmpfs none $directory || exit; done; echo ready && exec cat']);
	}

	static async create(world: World, options: ContainerHostOptions = {}): Promise<ContainerHost> {
		const host = new ContainerHost(world, options);
		await host.#holder.until('ready', () => host.#holder.stdout.includes('ready'));
		// `in` became unshare, whose only child is process 1 in there.
		host.#pid = Number(readFileSync(`/proc/${host.#holder.child.pid}/task/${host.#holder.child.pid}/children`, 'utf8'));
		return host;
	}

	path(...names: readonly string[]): string {
		return path.join(this.#world.directory, 'containers', ...names);
	}

	/** A path that a container's runtime told, as it is to be had from here. */
	outside(inside: string): string {
		return `/proc/${this.#pid}/root${inside}`;
	}

	/** A command that runs another one among podman's processes and mounts, where process 1 has the node's network namespace. What it runs is killed with it. */
	get enter(): readonly string[] {
		return ['nsenter', '-t', String(this.#pid), '-m', '-p', '--', 'setpriv', '--pdeathsig', 'KILL', '--'];
	}

	/** Ends what {@link enter} runs by its own signal: nsenter hands none on. */
	async stop(entered: Running, signal: 'SIGTERM' | 'SIGKILL'): Promise<void> {
		const {pid} = entered.child;
		const [inner] = entered.hasEnded ? [] : readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ').filter(Boolean);
		if (inner !== undefined) {
			process.kill(Number(inner), signal);
		}

		await entered.ended;
	}

	/** `podman …`, in the background. */
	podman(...args: readonly string[]): Running {
		return this.#world.node.start([
			...this.enter, 'env', `CONTAINERS_CONF=${this.path('containers.conf')}`, `CONTAINERS_STORAGE_CONF=${this.path('storage.conf')}`, 'podman', ...args,
		]);
	}

	/** Starts a container that runs `script` in busybox' shell, until the script ends. */
	container(name: string, script: string): Running {
		return this.podman('run', '--rm', '--name', name, '--cgroup-parent', `/${this.#world.id}`, '--rootfs', this.path('rootfs'), '/bin/sh', '-c', script);
	}

	/** The same for a pod, whose CNI plugins and cgroups are as under a kubelet. */
	pod({key, uid}: KubeletPod, script: string): Running {
		return this.podman('run', '--rm', '--name', [...key.split('/'), uid].join('_'), '--cgroup-parent', `/${this.#world.id}/kubepods/burstable/pod${uid}`, '--rootfs', this.path('rootfs'), '/bin/sh', '-c', script);
	}

	#writeConfiguration(cniVersion: string): void {
		this.#writeArguments();
		for (const directory of ['net.d', 'bin', 'rootfs/bin', 'tmp']) {
			mkdirSync(this.path(directory), {recursive: true});
		}

		copyFileSync(BUSYBOX, this.path('rootfs/bin/busybox'));
		for (const name of ['sh', 'nc', 'ip', 'sleep', 'cat', 'echo']) {
			symlinkSync('busybox', this.path('rootfs/bin', name));
		}

		writeFileSync(this.path('containers.conf'), `
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[network]
network_backend = "cni"
cni_plugin_dirs = ["/usr/lib/cni", "${this.path('kubelet')}", "${this.path('bin')}"]
network_config_dir = "${this.path('net.d')}"
default_network = "pods"
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "none"
tmp_dir = "${this.path('tmp')}"
`);
		writeFileSync(this.path('storage.conf'), `
[storage]
driver = "vfs"
runroot = "${this.path('runroot')}"
graphroot = "${this.path('graphroot')}"
`);
		const bridge = {
			type: 'bridge', bridge: 'br0', isGateway: false,
			ipam: {type: 'host-local', dataDir: this.path('ipam'), routes: [{dst: '0.0.0.0/0'}], ranges: [[{subnet: '10.77.0.0/24', rangeStart: '10.77.0.100', rangeEnd: '10.77.0.200', gateway: '10.77.0.1'}]]},
		};
		writeFileSync(this.path('net.d/10-pods.conflist'), JSON.stringify({cniVersion, name: 'pods', plugins: [bridge]}));
	}

	/** podman tells a plugin of the container's name alone, and a kubelet's runtime of the pod: found before the plugin itself, this says it as they do, of what {@link pod} started. */
	#writeArguments(): void {
		mkdirSync(this.path('kubelet'), {recursive: true});
		writeFileSync(this.path('kubelet', PLUGIN_NAME), `#!/bin/sh
name=\${CNI_ARGS##*K8S_POD_NAME=}
name=\${name%%;*}
case $name in *_*_*)
	rest=\${name#*_}
	export CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAMESPACE=\${name%%_*};K8S_POD_NAME=\${rest%%_*};K8S_POD_INFRA_CONTAINER_ID=$CNI_CONTAINERID;K8S_POD_UID=\${rest#*_}"
esac
exec ${this.path('bin', PLUGIN_NAME)}
`, {mode: 0o755});
	}

	/** Interfaces on the node's bridge. */
	links(): number {
		return must('ip', '-n', this.#world.node.netnsName, '-o', 'link', 'show', 'master', 'br0').split('\n').filter(Boolean).length;
	}
}

/** runc makes them in every hierarchy; the one that the world made goes with the world. What a killed test run left goes as well. */
export async function removeContainerCgroups(world: World): Promise<void> {
	const isGone = (id: string) => {
		const pid = /^sst-(\d+)-/.exec(id)?.[1];
		return pid !== undefined && !existsSync(`/proc/${pid}`);
	};

	const hierarchies = [CGROUPS, ...readdirSync(CGROUPS, {withFileTypes: true}).filter(entry => entry.isDirectory()).map(({name}) => path.join(CGROUPS, name))];
	for (const hierarchy of hierarchies) {
		for (const id of readdirSync(hierarchy).filter(name => name === world.id || isGone(name))) {
			const directory = path.join(hierarchy, id);
			// Processes that were killed leave a moment later.
			await eventually(`${directory} is empty`, () => removeTree(directory, directory === world.cgroup));
		}
	}
}

function removeTree(directory: string, keepTop: boolean): boolean {
	try {
		for (const entry of readdirSync(directory, {withFileTypes: true})) {
			if (entry.isDirectory() && !removeTree(path.join(directory, entry.name), false)) {
				return false;
			}
		}

		if (!keepTop) {
			rmdirSync(directory);
		}

		return true;
	} catch (error) {
		return hasErrno(error, 'ENOENT');
	}
}
